"""Client-level privacy: what one client can move, the noise, who takes part, where the clipping norm goes, and planted errors."""

import math

import numpy as np
import pytest

from fedpeft import UserError
from fedpeft.privacy import curator as module
from fedpeft.privacy.accounting import Release, epsilon, sigma_for
from fedpeft.privacy.curator import Curator, noise_split
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.noise import Insecure, Secure
from fedpeft.privacy.planning import client_plan
from fedpeft.records import Layout, Update
from fedpeft.sections import PrivacySection

SHAPES = {"a.lora_A.weight": (3, 40), "a.lora_B.weight": (50, 3), "head.weight": (2, 30)}
RECEIVED = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
UPLOADS = Layout.specs(RECEIVED)


def keeper(clients=10, fraction=1.0, sigma=0.0, C=0.5, path=None, **own):
    section = PrivacySection(unit="client", noise_multiplier=sigma, clipping_norm=C, **own)
    return Curator(section, client_plan(section, clients, fraction, rounds=20), Ledger(path), fraction)


def updates(count, seed=0, size=1.0):
    """Clients of very different sizes, one of which did not move and one of which moved far."""
    random, made = np.random.default_rng(seed), []
    for client in range(count):
        far = {0: 0.0, 1: 1e4}.get(client, size)
        arrays = {n: (x + far * random.normal(size=x.shape)).astype(np.float32) for n, x in RECEIVED.items()}
        made.append(Update(1, client, arrays, int(random.integers(1, 10**6))))
    return made


def summed(curator, some, C=None):
    """m (x' - x) [every number], and C of the next round."""
    C = curator.section.clipping_norm if C is None else C
    released = curator.release(Secure(), some, RECEIVED, UPLOADS, 1, C)
    moved = [(released.update.arrays[name].astype(np.float64) - RECEIVED[name]).ravel() * curator.m for name in sorted(SHAPES)]
    return np.concatenate(moved), released


# --- what one client can move


def test_a_client_added_or_removed_moves_the_sum_by_at_most_C():
    """Brute force: every subset that lacks one of six clients, whatever they sent and however many examples they claim."""
    curator, everybody = keeper(), updates(6)
    whole, _ = summed(curator, everybody)
    for left_out in range(6):
        rest, _ = summed(curator, [update for update in everybody if update.client != left_out])
        assert np.linalg.norm(whole - rest) <= 0.5 * (1 + 1e-4)
    alone, _ = summed(curator, everybody[1:2])
    assert np.linalg.norm(alone) == pytest.approx(0.5, rel=1e-4), "the bound is reached: head and factors are clipped together"


def test_clients_weigh_alike_and_the_denominator_is_fixed():
    curator = keeper(clients=8, fraction=0.5, C=1e6)
    two = [update for update in updates(5) if update.client > 2]
    moved, _ = summed(curator, two)
    by_hand = sum(np.concatenate([(u.arrays[n].astype(np.float64) - RECEIVED[n]).ravel() for n in sorted(SHAPES)]) for u in two)
    np.testing.assert_allclose(moved, by_hand, atol=1e-5)
    _, released = summed(curator, two)
    name = "head.weight"
    expected = RECEIVED[name] + sum(u.arrays[name].astype(np.float64) - RECEIVED[name] for u in two) / 4
    np.testing.assert_allclose(released.update.arrays[name], expected, atol=1e-6)


def test_an_update_that_is_not_finite_counts_as_none():
    broken = updates(3)[2]
    broken.arrays["head.weight"][0, 0] = np.inf
    moved, _ = summed(keeper(), [broken])
    assert not moved.any()


# --- noise


@pytest.mark.parametrize("people", [0, 3])
def test_the_noise_is_sigma_C_on_the_sum_also_when_nobody_takes_part(people):
    from scipy.stats import kstest

    curator, some = keeper(sigma=2.0), updates(people)
    without, _ = summed(keeper(), some)
    drawn = np.concatenate([summed(curator, some)[0] - without for _ in range(30)]) / (2.0 * 0.5)
    assert kstest(drawn, "norm").pvalue > 1e-4
    assert drawn.std() == pytest.approx(1.0, abs=0.03)


def test_noise_is_never_the_same_twice():
    curator = keeper(sigma=1.0)
    first, second = (summed(curator, [])[0] for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3


def test_a_round_is_on_disk_before_it_is_released(tmp_path, monkeypatch):
    path = tmp_path / "server.jsonl"
    curator, seen = keeper(sigma=1.0, path=path), []
    real = module.gaussian
    monkeypatch.setattr(module, "gaussian", lambda *given: seen.append(len(Ledger(path).history)) or real(*given))
    summed(curator, updates(2))
    assert seen == [1] * len(SHAPES), "charged before the first number of noise"
    assert Ledger(path).history == (Release(1.0, 1.0, 1),)


# --- who takes part


def test_each_client_takes_part_by_a_coin_of_its_own():
    curator, rounds, clients = keeper(clients=20, fraction=0.3, amplification=True), 2000, range(20)
    drawn = np.array([[client in taken for client in clients] for taken in (curator.sample(Secure(), clients) for _ in range(rounds))])
    assert np.abs(drawn.mean(axis=0) - 0.3).max() < 6 * math.sqrt(0.21 / rounds)
    assert drawn.sum(axis=1).var() == pytest.approx(20 * 0.21, rel=0.25), "a fixed number would have no variance"
    assert np.abs(np.corrcoef(drawn.T)[np.triu_indices(20, 1)]).max() < 6 / math.sqrt(rounds)
    assert curator.sample(Secure(), []) == []
    assert keeper(clients=5).sample(Secure(), range(5)) == list(range(5)), "everybody at fraction 1"


def test_only_a_secret_coin_is_accounted_as_amplification():
    assert keeper(clients=20, fraction=0.3).plan.q == 1.0
    assert keeper(clients=20, fraction=0.3, amplification=True).plan.q == 0.3


# --- accounting


CLIENT_LEVEL = [  # clients, asked, rounds, epsilon at sigma 1: amplified, as often as expected, in every round
    (10, 5, 50, 12.0, 18.7, 34.1),
    (100, 10, 100, 3.7, 12.2, 74),
    (1000, 50, 200, 3.4, 14.7, 146),
    (100_000, 1000, 1000, 2.0, 18.7, 642),
]


@pytest.mark.parametrize(("K", "m", "rounds", "amplified", "observed", "every"), CLIENT_LEVEL)
def test_epsilons_are_the_reference_ones(K, m, rounds, amplified, observed, every):
    for q, steps, expected in ((m / K, rounds, amplified), (1.0, rounds * m // K, observed), (1.0, rounds, every)):
        assert epsilon([Release(1.0, q, steps)], K**-1.1) == pytest.approx(expected, rel=0.01, abs=0.06)


def test_ten_clients_in_every_round_need_much_noise():
    assert sigma_for(8.0, 10**-1.1, 1.0, 50) == pytest.approx(2.35, abs=0.02)


# --- adaptive clipping


@pytest.mark.parametrize("start", [0.01, 50.0])
def test_the_clipping_norm_goes_to_the_quantile(start):
    """Norms of clients are spread over a decade; gamma = 0.7 of them is where C comes to rest, from either side."""
    norms = np.geomspace(0.3, 3.0, 50)
    curator, direction = keeper(clients=50, sigma=0.3, target_quantile=0.7), np.random.default_rng(3).normal(size=SHAPES["head.weight"])
    direction /= np.linalg.norm(direction)
    some = [
        Update(1, k, {**RECEIVED, "head.weight": (RECEIVED["head.weight"] + norm * direction).astype(np.float32)}, 1)
        for k, norm in enumerate(norms)
    ]
    C, late = start, []
    for round in range(120):
        released = curator.release(Secure(), some, RECEIVED, UPLOADS, round, C)
        C = released.clipping_norm
        late += [C] if round >= 80 else []
    assert np.mean([np.mean(norms <= c) for c in late]) == pytest.approx(0.7, abs=0.05)


def test_the_count_costs_its_share_of_sigma():
    section = PrivacySection(unit="client", noise_multiplier=1.0, target_quantile=0.5)
    for m, count in ((100, 5.0), (10, 1.0)):
        sigma_b, left = noise_split(section, 1.0, m)
        assert sigma_b == count
        assert left**-2 + (2 * sigma_b) ** -2 == pytest.approx(1.0), "both together are one Gaussian of sigma"
    assert noise_split(section, 1.0, 100)[1] == pytest.approx(1.005, abs=1e-3)
    assert noise_split(PrivacySection(unit="client", noise_multiplier=1.0), 1.0, 100) == (0.0, 1.0)
    with pytest.raises(UserError, match=r"privacy\.quantile_noise: 0\.5 is too little"):
        noise_split(PrivacySection(unit="client", noise_multiplier=1.0, target_quantile=0.5, quantile_noise=0.5), 1.0, 10)


def test_the_noise_of_a_round_uses_the_norm_of_that_round():
    curator = keeper(clients=50, sigma=1.0, target_quantile=0.5)
    drawn = np.concatenate([summed(curator, [], C=4.0)[0] for _ in range(20)])
    assert drawn.std() == pytest.approx(4.0 * curator.sigma, rel=0.05)
    assert curator.sigma > 1.0


def test_the_count_is_noisy_too():
    curator = keeper(clients=10, sigma=1.0, target_quantile=0.5)
    shares = [summed(curator, [])[1].below for _ in range(300)]
    assert np.std(shares) == pytest.approx(curator.count_noise / curator.m, rel=0.2)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)


# --- planted errors: each is seen failing


def by_examples(self, noise, some, received, uploads, round, C, real=Curator.release):
    """Weights n_k / sum n_k, as a plain federated average has."""
    total = sum(update.examples for update in some)
    weighted = [
        Update(
            1,
            u.client,
            {
                n: (
                    received[n] + module.clip({m: u.arrays[m] - received[m] for m in uploads}, C)[0][n] * u.examples / total * self.m
                ).astype(np.float32)
                for n in uploads
            },
            1,
        )
        for u in some
    ]
    return real(self, noise, weighted, received, uploads, round, math.inf)


def over_actual(self, noise, some, received, uploads, round, C, real=Curator.release):
    """Divided by how many replied."""
    m, self.m = self.m, max(len(some), 1)
    released = real(self, noise, some, received, uploads, round, C)
    self.m = m
    return released


def each_tensor(delta, C):
    """Every tensor is clipped for itself: three tensors move sqrt(3) C."""
    return {n: a * min(1.0, C / max(np.linalg.norm(a), 1e-300)) for n, a in delta.items()}, True


def adapters_only(delta, C, real=module.clip):
    """The head is left as it is."""
    kept, fits = real({n: a for n, a in delta.items() if "head" not in n}, C)
    return {**delta, **kept}, fits


def wrong_way(self, noise, some, received, uploads, round, C, real=Curator.release):
    """Flower 1.41: the count of what was clipped with the sign of what was not."""
    released = real(self, noise, some, received, uploads, round, C)
    return module.Released(released.update, C * C / released.clipping_norm, released.below)


PLANTED = {
    "weights by examples": ("Curator.release", by_examples, test_a_client_added_or_removed_moves_the_sum_by_at_most_C),
    "the actual denominator": ("Curator.release", over_actual, test_clients_weigh_alike_and_the_denominator_is_fixed),
    "the actual denominator, by sensitivity": (
        "Curator.release",
        over_actual,
        lambda: test_the_noise_is_sigma_C_on_the_sum_also_when_nobody_takes_part(0),
    ),
    "no noise": (
        "gaussian",
        lambda noise, count: np.zeros(count),
        lambda: test_the_noise_is_sigma_C_on_the_sum_also_when_nobody_takes_part(3),
    ),
    "noise scaled by m twice": (
        "gaussian",
        lambda noise, count, real=module.gaussian: real(noise, count) / 10,
        lambda: test_the_noise_is_sigma_C_on_the_sum_also_when_nobody_takes_part(0),
    ),
    "reused noise": (
        "gaussian",
        lambda noise, count, real=module.gaussian: real(Insecure(7, 1, 1), count),
        test_noise_is_never_the_same_twice,
    ),
    "clipped tensor by tensor": ("clip", each_tensor, test_a_client_added_or_removed_moves_the_sum_by_at_most_C),
    "the head unclipped": ("clip", adapters_only, test_a_client_added_or_removed_moves_the_sum_by_at_most_C),
    "not clipped": ("clip", lambda delta, C: (delta, True), test_a_client_added_or_removed_moves_the_sum_by_at_most_C),
    "a quantile that runs away": ("Curator.release", wrong_way, lambda: test_the_clipping_norm_goes_to_the_quantile(0.01)),
    "a fixed number of clients": (
        "Curator.sample",
        lambda self, noise, clients: sorted(np.random.default_rng().permutation(list(clients))[: round(self.m)]),
        test_each_client_takes_part_by_a_coin_of_its_own,
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_caught(error, monkeypatch):
    where, mutant, test = PLANTED[error]
    monkeypatch.setattr(f"fedpeft.privacy.curator.{where}", mutant)
    with pytest.raises(AssertionError):
        test()
