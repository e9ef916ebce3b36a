"""Every strategy x every property, against dense matrices. A new row of the table gets the whole suite.

A property is a function of a strategy that raises AssertionError; the last part plants errors and sees each one caught.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import UserError, arrays
from fedpeft.lookup import TABLES, find
from fedpeft.products import Product
from fedpeft.records import MERGED, Layout, Pair, TensorSpec, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.ffa_lora import FfaLora
from fedpeft.strategies.lora_fair import LoraFair
from fedpeft.strategies.over import Over
from fedpeft.strategies.strategy import Combined, Round

EXACT = {"ffa_lora", "ro_lora", "fed_svd", "flora", "fedex_lora"}
CORRECTED = {"lora_fair", "fedavg", "flora_na", "flex_lora", "fedsmooth_lora", "het_lora"}
PROTOCOLS = {"fedsa_lora", "fed_ask", "slora", "fed_sb"}  # what travels is not what trains: test_protocols.py
WRAPPERS = sorted(name for name in TABLES["strategy"] if issubclass(find("strategy", name), Over))
STRATEGIES = sorted(set(TABLES["strategy"]) - set(WRAPPERS) - PROTOCOLS)


@dataclasses.dataclass(frozen=True)
class Case:
    """A round of random updates: two adapted matrices, a head, K clients with unequal weights."""

    layout: Layout
    received: dict
    full: list  # per client, every tensor as trained
    counts: list
    number: int = 1

    def updates(self, strategy):
        names = strategy.trains(tuple(self.received), self.at)
        return [
            Update(self.number, client, {name: tensors[name] for name in names}, n)
            for client, (tensors, n) in enumerate(zip(self.full, self.counts, strict=True))
        ]

    @property
    def at(self):
        return Round(self.number, 10, self.layout)

    def step(self, strategy):
        """The global arrays after the round."""
        received = self.before(strategy)
        combined = strategy.combine(self.updates(strategy), received, self.at)
        return strategy.apply(received, combined.arrays, strategy.start(received))[0], combined.report

    def before(self, strategy):
        """The global arrays as the strategy has them: where factors do not outlive a round, B is zero."""
        sent = strategy.sends(tuple(self.received), self.at)
        zero = {pair.B for pair in self.layout.pairs} - set(sent)
        return {name: np.zeros_like(array) if name in zero else array for name, array in self.received.items()}

    def ideal(self, strategy, pair):
        """sum_k p_k s B_k A_k, formed densely in float64; frozen factors are those received."""
        names = strategy.trains(tuple(self.received), self.at)
        total = sum(self.counts)
        products = [
            pair.s * pick(tensors, self.received, names, pair.B).astype(float) @ pick(tensors, self.received, names, pair.A).astype(float)
            for tensors in self.full
        ]
        return sum(n / total * product for n, product in zip(self.counts, products, strict=True))


def pick(tensors, received, names, name):
    return tensors[name] if name in names else received[name]


def draw_case(seed, clients=3, d_out=7, d_in=5, r=2, rslora=False, dtype=np.float64, number=1, spread=1.0):
    generator = np.random.default_rng(seed)
    s = 16 / (r**0.5 if rslora else r)
    shapes = {}
    pairs = []
    for module, (rows, columns) in {"x": (d_out, d_in), "y": (d_in, d_out)}.items():
        pairs.append(Pair(module, f"{module}.lora_A.weight", f"{module}.lora_B.weight", s))
        shapes |= {f"{module}.lora_A.weight": (r, columns), f"{module}.lora_B.weight": (rows, r)}
    shapes["head.weight"] = (3, d_in)
    received = {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    full = [
        {name: (array + spread * generator.normal(size=array.shape)).astype(dtype) for name, array in received.items()}
        for _ in range(clients)
    ]
    specs = {name: TensorSpec(shape, np.dtype(dtype).name) for name, shape in shapes.items()}
    counts = [int(n) for n in generator.integers(1, 100, clients)]
    return Case(Layout(specs, tuple(pairs), ("head.weight",)), received, full, counts, number)


def product(tensors, pair):
    """The whole update of a matrix: s B A, and what was merged into the backbone."""
    merged = [name for name in tensors if name.startswith(MERGED) and name.endswith(f".{pair.module}.left")]
    backbone = sum(tensors[name].astype(float) @ tensors[name.removesuffix("left") + "right"].astype(float) for name in merged)
    return pair.s * tensors[pair.B].astype(float) @ tensors[pair.A].astype(float) + backbone


def unmerged(tensors):
    return {name: array for name, array in tensors.items() if not name.startswith(MERGED)}


def relative(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


cases = st.builds(
    draw_case,
    seed=st.integers(0, 2**32),
    clients=st.integers(1, 6),
    d_out=st.integers(2, 9),
    d_in=st.integers(2, 9),
    r=st.integers(1, 4),
    rslora=st.booleans(),
    number=st.integers(1, 4),
)


# --- properties ------------------------------------------------------------------------------------------------------


def one_client_is_returned(strategy, case):
    alone = dataclasses.replace(case, full=case.full[:1], counts=case.counts[:1])
    after, _ = alone.step(strategy)
    for pair in case.layout.pairs:
        assert relative(product(after, pair), alone.ideal(strategy, pair)) < 1e-10


def identical_clients_are_a_fixed_point(strategy, case):
    same = dataclasses.replace(case, full=case.full[:1] * len(case.full))
    after, _ = same.step(strategy)
    for pair in case.layout.pairs:
        assert relative(product(after, pair), same.ideal(strategy, pair)) < 1e-10


def the_update_is_the_ideal_one(strategy, case, tolerance=1e-12):
    after, _ = case.step(strategy)
    for pair in case.layout.pairs:
        wanted = case.ideal(strategy, pair)
        assert np.linalg.norm(product(after, pair) - wanted) <= tolerance * max(np.linalg.norm(wanted), 1.0)


def the_reported_error_is_the_dense_error(strategy, case):
    after, report = case.step(strategy)
    wanted = [case.ideal(strategy, pair) for pair in case.layout.pairs]
    off = [product(after, pair) - ideal for pair, ideal in zip(case.layout.pairs, wanted, strict=True)]
    size = np.sqrt(sum((ideal**2).sum() for ideal in wanted))
    assert report["aggregation_error"] == pytest.approx(np.sqrt(sum((part**2).sum() for part in off)) / size, rel=1e-6, abs=1e-12)


def the_head_is_the_weighted_mean(strategy, case):
    after, _ = case.step(strategy)
    mean = sum(n * tensors["head.weight"] for n, tensors in zip(case.counts, case.full, strict=True)) / sum(case.counts)
    np.testing.assert_allclose(after["head.weight"], mean, atol=1e-12)


def weights_are_shares_of_the_selected(strategy, case):
    """Scaling all n_k, renumbering the clients, or a client of weight zero changes no product."""
    after, _ = case.step(strategy)
    order = np.random.default_rng(0).permutation(len(case.full))
    others = [
        dataclasses.replace(case, counts=[7 * n for n in case.counts]),
        dataclasses.replace(case, full=[case.full[k] for k in order], counts=[case.counts[k] for k in order]),
        dataclasses.replace(case, full=[*case.full, draw_case(99, d_out=2).full[0] | case.full[0]], counts=[*case.counts, 0]),
    ]
    for other in others:
        changed, _ = other.step(strategy)
        for pair in case.layout.pairs:
            assert relative(product(changed, pair), product(after, pair)) < 1e-9


def frozen_tensors_stay_bit_identical_and_off_the_wire(strategy, case):
    names = set(case.received)
    sent = set(strategy.sends(tuple(names), case.at))
    assert set(strategy.trains(tuple(names), case.at)) <= names
    after, _ = case.step(strategy)  # what is not sent stays as every client drew it
    for name in names - sent:
        assert np.array_equal(after[name], case.before(strategy)[name])
    assert unmerged(after).keys() == case.received.keys()


def shapes_and_dtypes_are_kept(strategy, case):
    after, _ = case.step(strategy)
    assert Layout.specs(unmerged(after)) == dict(sorted(case.layout.tensors.items()))


PROPERTIES = [
    one_client_is_returned,
    identical_clients_are_a_fixed_point,
    the_reported_error_is_the_dense_error,
    the_head_is_the_weighted_mean,
    weights_are_shares_of_the_selected,
    frozen_tensors_stay_bit_identical_and_off_the_wire,
    shapes_and_dtypes_are_kept,
]


def build(name, **own):
    return find("strategy", name)(**({"regularisation": 0.0} if name == "lora_fair" else {}), **own)


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", STRATEGIES)
@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_property(name, check, case):
    check(build(name), case)


@pytest.mark.parametrize("name", sorted(EXACT))
@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_exact_strategies_are_exact_in_float64(name, case):
    the_update_is_the_ideal_one(build(name), case)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_strategies_are_exact_in_float32(name, number, rslora):
    case = draw_case(5, clients=4, d_out=40, d_in=30, r=4, rslora=rslora, dtype=np.float32, number=number)
    the_update_is_the_ideal_one(build(name), case, tolerance=1e-5)
    shapes_and_dtypes_are_kept(build(name), case)


def test_every_strategy_is_exact_or_corrected():
    assert set(STRATEGIES) == EXACT | CORRECTED
    for name in STRATEGIES:
        assert find("strategy", name).exact == (name in EXACT)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_of_factors_refuses_an_adapter_without_them(name):
    if name == "fedavg":
        build(name).check(Layout({}))
    else:
        with pytest.raises(UserError, match=find("strategy", name).__name__):
            build(name).check(Layout({}))


# --- FedAvg ----------------------------------------------------------------------------------------------------------


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_the_error_of_fedavg_is_the_cross_covariance_of_the_factors(case):
    after, _ = case.step(FedAvg())
    p = np.array(case.counts) / sum(case.counts)
    for pair in case.layout.pairs:
        cross = sum(
            share * pair.s * (tensors[pair.B] - after[pair.B]) @ (tensors[pair.A] - after[pair.A])
            for share, tensors in zip(p, case.full, strict=True)
        )
        np.testing.assert_allclose(case.ideal(FedAvg(), pair) - product(after, pair), cross, atol=1e-9)


# --- FFA-LoRA --------------------------------------------------------------------------------------------------------


def test_ffa_sends_half():
    case = draw_case(0, d_out=6, d_in=6)
    down = FfaLora().sends(tuple(case.received), case.at)
    assert set(down) == {"x.lora_B.weight", "y.lora_B.weight", "head.weight"}
    assert FfaLora().trains(tuple(case.received), case.at) == down


# --- LoRA-FAIR -------------------------------------------------------------------------------------------------------


def errors(case, *strategies):
    return [case.step(strategy)[1]["aggregation_error"] for strategy in strategies]


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_errors_are_ordered(case):
    """err(best of rank r) <= err(FAIR, lambda = 0) <= err(FAIR, lambda) <= err(FedAvg), growing with lambda."""
    fair = [LoraFair(regularisation=lam) for lam in (0.0, 1e-3, 0.1, 10.0)]
    found = errors(case, *fair, FedAvg())
    size = np.sqrt(sum((case.ideal(FedAvg(), pair) ** 2).sum() for pair in case.layout.pairs))
    best = 0.0
    for pair in case.layout.pairs:
        singular = np.linalg.svd(case.ideal(FedAvg(), pair), compute_uv=False)
        best += (singular[len(case.received[pair.A]) :] ** 2).sum()
    ordered = [np.sqrt(best) / size, *found]
    assert all(left <= right + 1e-9 for left, right in itertools.pairwise(ordered)), ordered


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_fair_without_regularisation_is_the_projection_on_the_rows_of_the_mean_A(case):
    after, _ = case.step(LoraFair(regularisation=0.0))
    for pair in case.layout.pairs:
        A = after[pair.A]
        np.testing.assert_allclose(product(after, pair), case.ideal(FedAvg(), pair) @ np.linalg.pinv(A) @ A, atol=1e-7)


def test_fair_leaves_A_as_averaged():
    case = draw_case(1)
    fair, plain = case.step(LoraFair())[0], case.step(FedAvg())[0]
    for pair in case.layout.pairs:
        assert np.array_equal(fair[pair.A], plain[pair.A])
        assert not np.array_equal(fair[pair.B], plain[pair.B])


def test_the_residual_vanishes_when_all_clients_span_the_same_rows():
    case = draw_case(2, clients=4)
    generator = np.random.default_rng(0)
    for tensors in case.full:
        for pair in case.layout.pairs:
            mixing = np.eye(2) + 0.2 * generator.normal(size=(2, 2))
            tensors[pair.A] = mixing @ case.received[pair.A]
    fair, plain = errors(case, LoraFair(regularisation=0.0), FedAvg())
    assert fair < 1e-12
    assert plain > 1e-3


def test_the_residual_stays_when_they_do_not():
    fair, plain = errors(draw_case(3, clients=4, d_out=30, d_in=30, spread=5.0), LoraFair(regularisation=0.0), FedAvg())
    assert 0.3 < fair < plain


def test_a_large_lambda_is_fedavg():
    case = draw_case(4)
    fair, plain = case.step(LoraFair(regularisation=1e12))[0], case.step(FedAvg())[0]
    assert arrays.norm(arrays.difference(fair, plain)) < 1e-8


def column_cosine(case, tensors, pair):
    wanted, got = case.ideal(FedAvg(), pair), product(tensors, pair)
    return np.mean((wanted * got).sum(axis=0) / np.linalg.norm(wanted, axis=0) / np.linalg.norm(got, axis=0))


@pytest.mark.parametrize("seed", range(5))
def test_the_cosine_solver_reaches_the_projections_direction_and_never_loses_to_the_mean(seed):
    case = draw_case(seed, clients=3, d_out=8, d_in=6)
    cosine = case.step(LoraFair(solver="cosine", regularisation=0.0, max_steps=5000))[0]
    plain = case.step(FedAvg())[0]
    held = case.step(LoraFair(solver="cosine", regularisation=0.01))[0]
    projected = case.step(LoraFair(regularisation=0.0))[0]
    for pair in case.layout.pairs:
        assert column_cosine(case, cosine, pair) >= column_cosine(case, projected, pair) - 1e-3
        assert column_cosine(case, held, pair) >= column_cosine(case, plain, pair) - 1e-9


def test_the_gradient_of_the_cosine_objective_is_that_of_torch():
    import torch

    case = draw_case(6, clients=3, d_out=8, d_in=6)
    pair = case.layout.pairs[0]
    plain = case.step(FedAvg())[0]
    caught = {}
    strategy = LoraFair(solver="cosine", regularisation=0.05, max_steps=1)
    import fedpeft.strategies.lora_fair as module

    original = module._descend
    try:
        module._descend = lambda objective, x, max_steps: caught.setdefault("objective", objective) and x
        ideal = aggregation.ideal(case.updates(strategy), pair, case.received).scaled(1 / pair.s)
        strategy._cosine(ideal, plain[pair.B], plain[pair.A])
    finally:
        module._descend = original
    dB = np.random.default_rng(0).normal(size=plain[pair.B].shape)
    value, gradient = caught["objective"](dB)
    x = torch.tensor(dB, requires_grad=True)
    wanted = torch.tensor(case.ideal(FedAvg(), pair) / pair.s)
    got = (torch.tensor(plain[pair.B]) + x) @ torch.tensor(plain[pair.A])
    loss = 1 - torch.nn.functional.cosine_similarity(wanted, got, dim=0).mean() + 0.05 * (x**2).sum()
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-10)
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-10)


# --- FLoRA-NA --------------------------------------------------------------------------------------------------------


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_scalars_never_lose_to_the_mean(case):
    best, plain = errors(case, build("flora_na"), FedAvg())
    assert best <= plain + 1e-9


def test_scalars_are_a_minimum():
    """No small change of any u or v, tried densely, lowers the error of a layer."""
    case = draw_case(12, clients=3, spread=3.0)
    pair = case.layout.pairs[0]
    A = np.stack([tensors[pair.A] for tensors in case.full])
    B = np.stack([tensors[pair.B] for tensors in case.full])
    p = np.array(case.counts) / sum(case.counts)
    ideal = np.einsum("k,kdr,kre->de", p, B, A)
    strategy = build("flora_na", max_steps=500)
    u, v = strategy._scalars(A, B, p)

    def off(u, v):
        return ((ideal - np.tensordot(v, B, axes=1) @ np.tensordot(u, A, axes=1)) ** 2).sum()

    least = off(u, v)
    assert least < off(p, p)
    for k in range(3):
        for change in (-1e-3, 1e-3):
            nudge = change * np.eye(3)[k]
            assert off(u + nudge, v) >= least - 1e-12
            assert off(u, v + nudge) >= least - 1e-12


# --- FLoRA, FedEx-LoRA, FlexLoRA -------------------------------------------------------------------------------------


def test_a_stack_has_the_rank_of_all_clients_and_factors_start_afresh():
    case = draw_case(13, clients=3, d_out=12, d_in=11)
    after, _ = case.step(build("flora"))
    for pair in case.layout.pairs:
        (left,) = [name for name in after if name.endswith(f".{pair.module}.left")]
        assert after[left].shape[1] == 3 * 2
        assert not after[pair.B].any()
        assert 0 < np.abs(after[pair.A]).max() <= 1 / np.sqrt(after[pair.A].shape[1])
    again, _ = case.step(build("flora"))
    later, _ = dataclasses.replace(case, number=2).step(build("flora"))
    assert np.array_equal(again["x.lora_A.weight"], after["x.lora_A.weight"])
    assert not np.array_equal(later["x.lora_A.weight"], after["x.lora_A.weight"])


def test_the_residual_has_a_rank_less_by_one_client():
    case = draw_case(14, clients=4, d_out=12, d_in=11)
    after, _ = case.step(build("fedex_lora"))
    plain, _ = case.step(FedAvg())
    for pair in case.layout.pairs:
        (left,) = [name for name in after if name.endswith(f".{pair.module}.left")]
        assert after[left].shape[1] == 3 * 2
        np.testing.assert_array_equal(after[pair.A], plain[pair.A])


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_flexlora_is_the_best_of_its_rank(case):
    after, _ = case.step(build("flex_lora"))
    for pair in case.layout.pairs:
        wanted = case.ideal(FedAvg(), pair)
        s = np.linalg.svd(wanted, compute_uv=False)
        r = len(case.received[pair.A])
        best = np.sqrt((s[r:] ** 2).sum())
        assert np.linalg.norm(product(after, pair) - wanted) <= best + 1e-8 * max(1.0, s[0])
        assert np.linalg.norm(after[pair.A]) == pytest.approx(np.linalg.norm(after[pair.B]), rel=1e-6), "an even split"


# --- FedSVD ----------------------------------------------------------------------------------------------------------


def test_fedsvd_gives_A_orthonormal_rows():
    case = draw_case(7)
    after, _ = case.step(build("fed_svd"))
    for pair in case.layout.pairs:
        np.testing.assert_allclose(after[pair.A] @ after[pair.A].T, np.eye(2), atol=1e-12)


def test_fedsvd_keeps_A_while_B_is_zero():
    case = draw_case(8)
    for tensors in case.full:
        for pair in case.layout.pairs:
            tensors[pair.B][:] = 0
    after, _ = case.step(build("fed_svd"))
    for pair in case.layout.pairs:
        assert np.array_equal(after[pair.A], case.received[pair.A])


# --- planted errors: each is seen failing ----------------------------------------------------------------------------


class DroppedScaling(LoraFair):
    """Forgets s where the ideal update is taken, but not where it is used."""

    def _closed_form(self, ideal, B, A):
        return super()._closed_form(ideal.scaled(2.0), B, A)


class TransposedResidual(LoraFair):
    """Right for square matrices of equal factors, wrong for all others."""

    def _closed_form(self, ideal, B, A):
        turned = Product(ideal.right.T, ideal.left.T)
        return super()._closed_form(turned if turned.shape == ideal.shape else ideal.scaled(1.1), B, A)


class WeightsOfAnother(FedAvg):
    """Attaches each weight to the next client."""

    def combine(self, updates, received, at):
        counts = [update.examples for update in updates]
        shifted = [dataclasses.replace(update, examples=n) for update, n in zip(updates, counts[1:] + counts[:1], strict=True)]
        return super().combine(shifted, received, at)


class UniformWeights(FedAvg):
    def combine(self, updates, received, at):
        return super().combine([dataclasses.replace(update, examples=1) for update in updates], received, at)


class UnnormalisedWeights(FfaLora):
    def combine(self, updates, received, at):
        mean = aggregation.mean(updates)
        return Combined({name: array * 1.01 for name, array in mean.items()}, {})


class MovesA(FfaLora):
    def apply(self, state_arrays, combined, state):
        moved = {name: array + 1e-7 if "lora_A" in name else array for name, array in state_arrays.items()}
        return super().apply(moved, combined, state)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (DroppedScaling(regularisation=0.0), one_client_is_returned),
        (DroppedScaling(regularisation=0.0), identical_clients_are_a_fixed_point),
        (TransposedResidual(regularisation=0.0), one_client_is_returned),
        (WeightsOfAnother(), the_head_is_the_weighted_mean),
        (UniformWeights(), the_head_is_the_weighted_mean),
        (WeightsOfAnother(), the_reported_error_is_the_dense_error),
        (UnnormalisedWeights(), the_update_is_the_ideal_one),
        (UnnormalisedWeights(), one_client_is_returned),
        (MovesA(), frozen_tensors_stay_bit_identical_and_off_the_wire),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_planted_error_is_caught(mutant, check):
    with pytest.raises(AssertionError):
        check(mutant, draw_case(11, clients=4))
