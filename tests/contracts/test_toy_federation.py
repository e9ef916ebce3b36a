"""Strategies on a federation small enough to know the answer: four linear regressions, exact gradients, many rounds.

Client k wants W_k = a common part of rank 2 and one of its own; the global model has rank 2. Exact aggregation does not decide
who wins here: FFA stalls in its random row space, and what FedEx merges keeps the clients' drift.
"""

import numpy as np
import pytest

from fedpeft.lookup import find
from fedpeft.records import MERGED, Layout, Pair, Update
from fedpeft.strategies.strategy import Round

D_OUT, D_IN, R, CLIENTS = 10, 12, 2, 4
A, B = "m.lora_A.weight", "m.lora_B.weight"


def wanted():
    generator = np.random.default_rng(0)
    common = generator.normal(size=(D_OUT, R)) @ generator.normal(size=(R, D_IN))
    own = [0.5 * generator.normal(size=(D_OUT, R)) @ generator.normal(size=(R, D_IN)) for _ in range(CLIENTS)]
    return [common + part for part in own]


def backbone(arrays):
    lefts = [name for name in arrays if name.startswith(MERGED) and name.endswith("left")]
    return sum((arrays[left] @ arrays[left.removesuffix("left") + "right"] for left in lefts), np.zeros((D_OUT, D_IN)))


def final_loss(name, local_steps, rounds=150, rate=0.02):
    """The mean squared error of the global model over all clients, after plain gradient descent on ||W - W_k||^2 / 2."""
    strategy, targets = find("strategy", name)(**({"regularisation": 1e-2} if name == "lora_fair" else {})), wanted()
    generator = np.random.default_rng(1)
    arrays = {A: generator.normal(size=(R, D_IN)) / np.sqrt(D_IN), B: np.zeros((D_OUT, R))}
    layout = Layout(Layout.specs(arrays), (Pair("m", A, B, 1.0, R),))
    state = strategy.start(arrays)
    for number in range(1, rounds + 1):
        at = Round(number, rounds, layout, clients=CLIENTS)
        names, updates = strategy.trains((A, B), at), []
        for client, target in enumerate(targets):
            own = {A: arrays[A], B: arrays[B]}
            fixed = backbone(arrays) - target
            for _ in range(local_steps):
                G = own[B] @ own[A] + fixed
                gradient = {A: own[B].T @ G, B: G @ own[A].T}
                own = own | {factor: own[factor] - rate * gradient[factor] for factor in names}
            updates.append(Update(number, client, {factor: own[factor] for factor in names}, 1))
        combined = strategy.combine(updates, arrays, at)
        arrays, state = strategy.apply(arrays, combined.arrays, state)
        if len(arrays) > 20:  # many merges are one
            arrays = {A: arrays[A], B: arrays[B], "merged.00000.m.left": backbone(arrays), "merged.00000.m.right": np.eye(D_IN)}
    W = arrays[B] @ arrays[A] + backbone(arrays)
    return float(np.mean([np.sum((W - target) ** 2) for target in targets]))


def best_of_rank():
    mean = np.mean(wanted(), axis=0)
    U, S, Vt = np.linalg.svd(mean)
    best = (U[:, :R] * S[:R]) @ Vt[:R]
    return float(np.mean([np.sum((best - target) ** 2) for target in wanted()]))


def test_a_frozen_random_row_space_stalls_and_the_others_do_not():
    """FedSVD turns A within the rows it was drawn with: V_r spans them, so it ends where FFA ends."""
    best = best_of_rank()
    losses = {name: final_loss(name, 20) for name in ("ffa_lora", "fed_svd", "fedavg", "lora_fair", "flora_na", "flex_lora", "ro_lora")}
    for name in ("fedavg", "lora_fair", "flora_na", "flex_lora", "ro_lora"):
        assert best - 1e-6 <= losses[name] < 1.06 * best, losses
    assert losses["ffa_lora"] > 2 * best, losses
    assert losses["fed_svd"] == pytest.approx(losses["ffa_lora"], rel=1e-3), losses


def test_a_merged_residual_is_like_averaging_at_one_local_step_and_keeps_the_drift_of_many():
    one, many = (final_loss("fedex_lora", steps) for steps in (1, 20))
    assert one == pytest.approx(final_loss("fedavg", 1), rel=0.05)
    assert many > 2 * final_loss("fedavg", 20)


@pytest.mark.parametrize("name", ["fedavg", "lora_fair", "flex_lora"])
def test_more_rounds_come_nearer(name):
    assert final_loss(name, 5, rounds=100) < final_loss(name, 5, rounds=10)
