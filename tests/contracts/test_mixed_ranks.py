"""Clients of different ranks: who accepts them, and that what they send and are sent is right, against dense float64 matrices."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import Config, UserError
from fedpeft.adapters.ranks import Named, deal, highest
from fedpeft.lookup import TABLES, find
from fedpeft.products import Product
from fedpeft.records import Update
from fedpeft.strategies.fitting import fitted, raised
from fedpeft.strategies.strategy import Round

from .test_strategies import WRAPPERS, draw_case, product, relative

ACCEPT = {"flora", "flex_lora", "het_lora", "fedex_lora"}
EXACT = ["flora", "fedex_lora"]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A round in which client k has rank `ranks[k]`."""

    whole: object  # a Case at the highest rank
    ranks: tuple

    @property
    def layout(self):
        pairs = tuple(dataclasses.replace(pair, r=max(self.ranks)) for pair in self.whole.layout.pairs)
        return dataclasses.replace(self.whole.layout, pairs=pairs)

    @property
    def at(self):
        return Round(1, 10, self.layout)

    def updates(self):
        generator = np.random.default_rng(5)
        updates = []
        for client, (r, n) in enumerate(zip(self.ranks, self.whole.counts, strict=True)):
            specs = self.layout.cut(r).tensors
            updates.append(Update(1, client, {name: generator.normal(size=spec.shape) for name, spec in specs.items()}, n))
        return updates

    def ideal(self, pair, updates):
        total = sum(update.examples for update in updates)
        return sum(
            update.examples / total * own.s * update.arrays[pair.B] @ update.arrays[pair.A]
            for update, own in ((update, self.own(pair, update)) for update in updates)
        )

    def own(self, pair, update):
        layout = self.layout.cut(self.ranks[update.client])
        return next(each for each in layout.pairs if each.module == pair.module)

    def step(self, strategy, updates):
        combined = strategy.combine(updates, self.whole.received, self.at)
        return strategy.apply(self.whole.received, combined.arrays, {})[0], combined.report


def draw_mixed(seed, ranks=(1, 2, 4), rslora=False, d_out=9, d_in=7):
    case = draw_case(seed, clients=len(ranks), d_out=d_out, d_in=d_in, r=max(ranks), rslora=rslora)
    pairs = tuple(dataclasses.replace(pair, power=0.5 if rslora else 1.0) for pair in case.layout.pairs)
    return Mixed(dataclasses.replace(case, layout=dataclasses.replace(case.layout, pairs=pairs)), tuple(ranks))


mixed = st.builds(
    draw_mixed,
    seed=st.integers(0, 2**32),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    rslora=st.booleans(),
    d_out=st.integers(5, 9),
    d_in=st.integers(5, 9),
)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_clients_scaling_is_that_of_its_rank(rslora):
    case = draw_mixed(0, ranks=(2, 8), rslora=rslora)
    for pair in case.layout.pairs:
        assert pair.scaling(2) == pytest.approx(16 / (2**0.5 if rslora else 2))
        assert case.layout.cut(2).pairs[0].s == pytest.approx(pair.scaling(2))


@pytest.mark.parametrize("name", EXACT)
@given(case=mixed)
@settings(max_examples=25, deadline=None)
def test_the_update_is_the_weighted_sum_of_every_clients_own_product(name, case):
    updates = case.updates()
    after, report = case.step(find("strategy", name)(), updates)
    for pair in case.layout.pairs:
        assert relative(product(after, pair), case.ideal(pair, updates)) < 1e-9
    assert report["aggregation_error"] < 1e-7


@given(case=mixed)
@settings(max_examples=25, deadline=None)
def test_flexlora_keeps_the_best_of_the_highest_rank(case):
    updates = case.updates()
    after, _ = case.step(find("strategy", "flex_lora")(), updates)
    for pair in case.layout.pairs:
        wanted = case.ideal(pair, updates)
        best = np.sqrt((np.linalg.svd(wanted, compute_uv=False)[max(case.ranks) :] ** 2).sum())
        assert np.linalg.norm(product(after, pair) - wanted) <= best + 1e-8 * np.linalg.norm(wanted)


@given(case=mixed, r=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_what_a_client_is_sent_is_the_best_it_can_hold(case, r):
    """Eckart and Young, in the client's own scaling; and the error that is reported is the dense one."""
    r = min(r, max(case.ranks))
    own = case.layout.cut(r)
    sent, left_out = fitted(case.whole.received, case.layout, own)
    errors = []
    for pair, mine in zip(case.layout.pairs, own.pairs, strict=True):
        wanted = product(case.whole.received, pair)
        assert sent[pair.A].shape[0] == sent[pair.B].shape[1] == r
        best = np.sqrt((np.linalg.svd(wanted, compute_uv=False)[r:] ** 2).sum())
        off = np.linalg.norm(product(sent, mine) - wanted)
        assert off == pytest.approx(best, abs=1e-7 * np.linalg.norm(wanted))
        errors.append(off / np.linalg.norm(wanted))
    assert left_out == pytest.approx(np.mean(errors), abs=1e-6)


def test_before_anything_is_learned_a_client_gets_the_first_rows_as_drawn():
    case = draw_mixed(1)
    fresh = {name: np.zeros_like(array) if "lora_B" in name else array for name, array in case.whole.received.items()}
    sent, left_out = fitted(fresh, case.layout, case.layout.cut(2))
    assert left_out == 0
    for pair in case.layout.pairs:
        np.testing.assert_array_equal(sent[pair.A], fresh[pair.A][:2])
        assert not sent[pair.B].any()


# --- HetLoRA ---------------------------------------------------------------------------------------------------------


def dense_het(case, updates):
    """The paper's sum, factor by factor, with the roots of the scalings."""
    found = {}
    for pair in case.layout.pairs:
        norms = [np.linalg.norm(case.own(pair, update).s * update.arrays[pair.B] @ update.arrays[pair.A]) for update in updates]
        A, B = np.zeros_like(case.whole.received[pair.A]), np.zeros_like(case.whole.received[pair.B])
        for norm, update in zip(norms, updates, strict=True):
            r, root = case.ranks[update.client], (case.own(pair, update).s / pair.s) ** 0.5
            A[:r] += norm / sum(norms) * root * update.arrays[pair.A]
            B[:, :r] += norm / sum(norms) * root * update.arrays[pair.B]
        found |= {pair.A: A, pair.B: B}
    return found


@given(case=mixed)
@settings(max_examples=25, deadline=None)
def test_hetlora_weighs_by_the_size_of_the_update(case):
    updates = case.updates()
    after, _ = case.step(find("strategy", "het_lora")(), updates)
    for name, wanted in dense_het(case, updates).items():
        np.testing.assert_allclose(after[name], wanted, atol=1e-10)


def test_hetlora_returns_a_single_clients_own_factors_and_nothing_above_its_rank():
    case = draw_mixed(2, ranks=(2, 4))
    strategy = find("strategy", "het_lora")()
    updates = case.updates()[:1]
    after, _ = case.step(strategy, updates)
    sent, left_out = strategy.fit(after, case.layout, case.layout.cut(2))
    assert left_out < 1e-12
    for pair in case.layout.pairs:
        assert not after[pair.A][2:].any()
        assert not after[pair.B][:, 2:].any()
        for name in (pair.A, pair.B):
            np.testing.assert_allclose(sent[name], updates[0].arrays[name], atol=1e-12)


def test_the_tail_penalty_is_autograds(tiny_config):
    """theta moves by eta times the gradient of lambda ||A[c:]|| ||B[:, c:]||, more than without it."""
    import torch

    from fedpeft.simulations.assemble import assemble
    from fedpeft.training import one
    from fedpeft.training.job import Job

    config = Config.from_dict(
        {
            **tiny_config.as_dict(),
            "training": {**tiny_config.as_dict()["training"], "optimizer": "sgd", "max_steps": 1, "max_grad_norm": None},
        }
    )
    parts = assemble(config)
    start = {name: array + 0.1 for name, array in parts.adapted.read().items()}
    data = parts.worker.nodes[0].train
    with_tail, without = (
        one.train(parts.adapted, parts.task, config, [Job(0, 1, start, parts.adapted.trained, data, tail=(strength, 0.5))])[0].arrays
        for strength in (0.3, 0.0)
    )
    rate = config.training.learning_rate
    for pair in parts.adapted.layout().pairs:
        A, B = (torch.tensor(start[name], requires_grad=True) for name in (pair.A, pair.B))
        (0.3 * A[2:].norm() * B[:, 2:].norm()).backward()
        for name, factor in ((pair.A, A), (pair.B, B)):
            np.testing.assert_allclose(without[name] - with_tail[name], rate * factor.grad.numpy(), atol=1e-6)
            assert np.abs(factor.grad.numpy()).max() > 0.01


# --- who may, and whose rank is what ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TABLES["strategy"]))
def test_a_strategy_accepts_clients_of_their_own_rank_or_refuses_them_with_the_reason(name):
    strategy = {"name": name} | ({"of": "factors"} if "of" in find("strategy", name).model_fields else {})
    given = {"adapter": {"name": "lora", "r": [2, 4]}, "strategy": strategy, "training": {"optimizer": "sgd"}}
    assert find("strategy", name)(**{key: value for key, value in strategy.items() if key != "name"}).mixed_ranks == (name in ACCEPT)
    if name in ACCEPT:
        assert Config.from_dict(given).adapter.r == [2, 4]
    else:
        with pytest.raises(UserError, match="clients of different ranks"):
            Config.from_dict(given)


def test_wrappers_over_one_that_accepts_may_accept_too():
    config = Config.from_dict({"adapter": {"name": "lora", "r": [2, 4]}, "strategy": {"name": "fedprox", "over": "flora"}})
    assert config.strategy.build().inner.mixed_ranks
    assert set(WRAPPERS) & ACCEPT == set()


def test_ranks_are_dealt_as_they_are_given():
    names = ["a", "b", "c", "d", "e"]
    assert deal(8, names, 0) == [8] * 5
    assert deal([1, 2], names, 0) == [1, 2, 1, 2, 1]
    assert sorted(deal({4: 0.6, 16: 0.4}, names, 0)) == [4, 4, 4, 16, 16]
    assert sorted(deal({4: 3, 16: 1}, names, 0)) == [4, 4, 4, 4, 16]
    assert len({tuple(deal({4: 0.6, 16: 0.4}, names, seed)) for seed in range(9)}) > 1
    assert deal(Named(clients={"b": 3, 4: 5}, rest=2), names, 0) == [2, 3, 2, 2, 5]
    assert [highest(r) for r in (8, [1, 2], {4: 1, 16: 1}, Named(clients={"b": 3}, rest=2))] == [8, 2, 16, 3]


@pytest.mark.parametrize("r", [[], [0], {}, {0: 1.0}, {4: 0}, {"clients": {"a": 0}, "rest": 4}, {"clients": {"a": 2}}, "eight"])
def test_ranks_that_are_none_are_refused(r):
    with pytest.raises(UserError, match=r"adapter\.r"):
        Config.from_dict({"adapter": {"name": "lora", "r": r}, "strategy": {"name": "flora"}})


def test_a_rank_for_a_client_that_is_not_there_is_refused(tiny_settings):
    from fedpeft.simulations.assemble import assemble

    given = {**tiny_settings, "adapter": {"name": "lora", "r": {"clients": {"nobody": 2}, "rest": 4}}, "strategy": {"name": "flora"}}
    with pytest.raises(UserError, match="there is no client 'nobody'"):
        assemble(Config.from_dict(given))


# --- in a run --------------------------------------------------------------------------------------------------------


def test_training_in_a_wider_model_is_training_at_the_own_rank(tiny_settings):
    """Rank 2 inside a model of rank 4 against a model of rank 2: same numbers; and the rest stays exactly zero."""
    from fedpeft.simulations.assemble import assemble
    from fedpeft.training import one
    from fedpeft.training.job import Job

    training = {**tiny_settings["training"], "max_steps": 4, "weight_decay": 0.1}
    ends = {}
    for r in (2, 4):
        config = Config.from_dict({**tiny_settings, "training": training, "adapter": {**tiny_settings["adapter"], "r": r}})
        parts = assemble(config)
        layout = parts.adapted.layout() if r == 2 else parts.adapted.layout().cut(2)
        generator = np.random.default_rng(0)
        start = {name: 0.1 * generator.normal(size=spec.shape).astype(np.float32) for name, spec in layout.tensors.items()}
        (trained,) = one.train(parts.adapted, parts.task, config, [Job(0, 1, start, parts.adapted.trained, parts.worker.nodes[0].train)])
        ends[r] = trained.arrays
        if r == 4:
            for pair in layout.pairs:
                assert not parts.adapted.parameters[pair.A].detach()[2:].any()
                assert not parts.adapted.parameters[pair.B].detach()[:, 2:].any()
    for name in ends[2]:
        assert np.abs(ends[2][name] - start[name]).max() > 1e-3
        np.testing.assert_allclose(ends[4][name], ends[2][name], atol=1e-6)


@pytest.mark.parametrize("name", sorted(ACCEPT))
def test_bytes_are_those_of_each_clients_rank(name, tiny_settings, tmp_path):
    import json

    from fedpeft import simulate

    lines = {}
    for r in (2, [2, 4, 2, 4], 4):
        given = {**tiny_settings, "adapter": {**tiny_settings["adapter"], "r": r}, "strategy": {"name": name, "num_rounds": 2}}
        run = simulate(Config.from_dict(given), tmp_path / str(r))
        assert run.summary["rejected_updates"] == 0
        lines[str(r)] = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    up = [lines[r][2]["bytes_up"] for r in ("2", "[2, 4, 2, 4]", "4")]
    assert up[1] == pytest.approx((up[0] + up[2]) / 2, rel=0.01)
    assert up[2] > 1.1 * up[0]
    assert "left_out_by_rank" in lines["[2, 4, 2, 4]"][2]["report"]


def test_an_update_of_another_rank_is_left_out_alone(tiny_settings, tmp_path):
    from test_rounds import play, rewritten

    def shrunk(update):
        return {
            name: array[:1] if "lora_A" in name else array[:, :1] if "lora_B" in name else array for name, array in update.arrays.items()
        }

    given = {**tiny_settings, "adapter": {**tiny_settings["adapter"], "r": [2, 4]}, "strategy": {"name": "flora", "num_rounds": 2}}
    outcome, _ = play(Config.from_dict(given), tmp_path, rewritten(arrays=shrunk))
    assert outcome.records[2].accepted == 3
    assert "wrong tensors" in outcome.records[2].rejected_clients["1"]
    assert "[4, 32]" in outcome.records[2].rejected_clients["1"]


# --- planted errors --------------------------------------------------------------------------------------------------


def test_the_scaling_of_the_highest_rank_for_all_is_caught():
    """What averages B_k A_k without each client's own s_k."""
    case = draw_mixed(3)
    updates = case.updates()
    blind = dataclasses.replace(case.layout, pairs=tuple(dataclasses.replace(pair, r=0) for pair in case.layout.pairs))
    combined = find("strategy", "flora")().combine(updates, case.whole.received, Round(1, 10, blind))
    after = {**case.whole.received, **combined.arrays}
    assert all(relative(product(after, pair), case.ideal(pair, updates)) > 0.1 for pair in case.layout.pairs)


def test_padding_without_the_roots_of_the_scalings_is_caught():
    case = draw_mixed(4)
    update = case.updates()[0]
    blind = dataclasses.replace(case.layout, pairs=tuple(dataclasses.replace(pair, r=0) for pair in case.layout.pairs))
    for pair in case.layout.pairs:
        own = case.own(pair, update)
        wanted = own.s * update.arrays[own.B] @ update.arrays[own.A]
        right, wrong = (raised(update, layout).arrays for layout in (case.layout, blind))
        assert relative(pair.s * right[pair.B] @ right[pair.A], wanted) < 1e-12
        assert relative(pair.s * wrong[pair.B] @ wrong[pair.A], wanted) > 0.1
        assert Product.of(right[pair.B], right[pair.A]).rank == 4
