"""FedSmoothLoRA's identities: what the start is, what the upload says, what returning clients subtract."""

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError, simulate
from fedpeft.arrays import digest
from fedpeft.products import Product
from fedpeft.records import Layout, Pair, TensorSpec, merge_names
from fedpeft.simulations.assemble import assemble
from fedpeft.strategies.fedsmooth_lora import FedSmoothLora
from fedpeft.strategies.strategy import Round, Turn
from fedpeft.training import evaluate
from fedpeft.training.gradients import full_gradients

D_OUT, D_IN, R, S = 9, 8, 2, 1.5
PAIR = Pair("m", "m.lora_A.weight", "m.lora_B.weight", S)
LAYOUT = Layout({PAIR.A: TensorSpec((R, D_IN), "float64"), PAIR.B: TensorSpec((D_OUT, R), "float64")}, (PAIR,))


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def turn(number=1, memory=None, merges=(), r=R, seed=0):
    """A client's turn whose gradient is a fixed random matrix; `merges` are (round, left, right) with s inside."""
    received = {PAIR.A: normal(r, D_IN, seed=9), PAIR.B: np.zeros((D_OUT, r))}
    for round, left, right in merges:
        names = merge_names(round, "m")
        received |= {names[0]: left, names[1]: right}
    asked = []

    def gradients(arrays, batches):
        asked.append(arrays)
        return iter([("m", normal(D_OUT, D_IN, seed=seed + 100))])

    return Turn(Round(number, 10, LAYOUT), received, memory or {}, gradients), asked


def shift(start, number):
    left, right = merge_names(number, "m")
    return start[left] @ start[right]


def adapter(start):
    return S * start[PAIR.B] @ start[PAIR.A]


def test_the_aligned_matrix_has_equal_singular_values_whatever_the_gradient():
    W = FedSmoothLora(gamma=16.0).aligned(normal(D_OUT, D_IN), R)
    singular = np.linalg.svd(W.dense(), compute_uv=False)
    np.testing.assert_allclose(singular[:R], np.sqrt(D_OUT) / 16.0)
    np.testing.assert_allclose(singular[R:], 0, atol=1e-12)
    c = D_OUT**0.5 / 16.0
    np.testing.assert_allclose(W.right @ W.right.T, c * np.eye(R), atol=1e-12)
    np.testing.assert_allclose(W.left.T @ W.left, c * np.eye(R), atol=1e-12)


def test_A_takes_the_first_and_B_the_next_singular_directions():
    G = normal(D_OUT, D_IN)
    u, _, vt = np.linalg.svd(G)
    W = FedSmoothLora().aligned(G, R)
    assert abs(abs(W.right[0] @ vt[0]) - np.linalg.norm(W.right[0])) < 1e-12
    assert abs(abs(W.left[:, 0] @ u[:, R]) - np.linalg.norm(W.left[:, 0])) < 1e-12


def test_a_first_start_is_the_backbone():
    strategy = FedSmoothLora()
    at, _ = turn()
    start = strategy.begin(at)
    np.testing.assert_allclose(adapter(start) + shift(start, 1), 0, atol=1e-6)
    assert np.abs(adapter(start)).max() > 1e-3
    assert np.abs(start[PAIR.A]).max() > 0
    assert np.abs(start[PAIR.B]).max() > 0


def test_a_late_first_start_is_the_backbone_too():
    """The published code would start it from the last global model."""
    at, _ = turn(number=4, merges=[(n, normal(D_OUT, R, seed=n), normal(R, D_IN, seed=n)) for n in (1, 2, 3)])
    start = FedSmoothLora().begin(at)
    np.testing.assert_allclose(adapter(start) + shift(start, 4), 0, atol=1e-6)


def test_an_upload_without_training_is_nothing_the_first_time():
    strategy = FedSmoothLora()
    at, _ = turn()
    start = strategy.begin(at)
    upload, _ = strategy.end(at, start, {name: start[name] for name in (PAIR.A, PAIR.B)})
    np.testing.assert_allclose(upload[PAIR.B] @ upload[PAIR.A], 0, atol=1e-6)


def memory_of(number, seed=3):
    return {PAIR.A: normal(R, D_IN, seed=seed), PAIR.B: normal(D_OUT, R, seed=seed), "round": np.array(number)}


@pytest.mark.parametrize("zeta", [1.0, 0.5, 0.0])
def test_round_matching_subtracts_every_merge_since_the_clients_upload(zeta):
    merges = [(n, normal(D_OUT, R, seed=n), normal(R, D_IN, seed=n)) for n in (1, 2, 3, 4)]
    memory = memory_of(3)  # took part in round 3, on a backbone with the merges of rounds 1 and 2
    at, _ = turn(number=5, memory=memory, merges=merges)
    M = FedSmoothLora(zeta=zeta, zeta_schedule="constant").matching(at, PAIR)
    since = sum(left @ right for n, left, right in merges if n >= 3) / S
    np.testing.assert_allclose(M.dense(), zeta * (memory[PAIR.B] @ memory[PAIR.A] - since), atol=1e-12)


def test_with_room_for_its_rank_a_client_starts_where_it_ended():
    """zeta = 1: W + s M_rm is the client's own last model. Truncation to 4 ranks is exact for one ga, one memory, one merge of rank 1."""
    wide = 4
    pair = PAIR
    memory = {pair.A: np.zeros((wide, D_IN)), pair.B: np.zeros((D_OUT, wide)), "round": np.array(1)}
    memory[pair.A][:1], memory[pair.B][:, :1] = normal(1, D_IN), normal(D_OUT, 1)
    left, right = normal(D_OUT, 1, seed=5), normal(1, D_IN, seed=5)
    at, _ = turn(number=2, memory=memory, merges=[(1, left, right)], r=wide)

    class Narrow(FedSmoothLora):
        def aligned(self, G, r):
            W = super().aligned(G, 2)  # rank 2 of 4, so that ga + memory + merge fit
            return Product(np.pad(W.left, ((0, 0), (0, 2))), np.pad(W.right, ((0, 2), (0, 0))))

    start = Narrow(zeta_schedule="constant").begin(at)
    effective = left @ right + adapter(start) + shift(start, 2)  # backbone + start
    np.testing.assert_allclose(effective, S * memory[pair.B] @ memory[pair.A], atol=1e-5)


def test_the_gradient_is_asked_at_the_matched_model():
    memory = memory_of(1)
    at, asked = turn(number=2, memory=memory, merges=[(1, normal(D_OUT, R), normal(R, D_IN))])
    strategy = FedSmoothLora(zeta_schedule="constant")
    strategy.begin(at)
    left, right = merge_names(2, "m")
    np.testing.assert_allclose(asked[0][left] @ asked[0][right], S * strategy.matching(at, PAIR).dense(), atol=1e-5)


def test_the_upload_is_the_best_of_rank_r_of_the_whole_local_change():
    strategy = FedSmoothLora()
    at, _ = turn()
    start = strategy.begin(at)
    trained = {PAIR.A: start[PAIR.A] + 0.1 * normal(R, D_IN), PAIR.B: start[PAIR.B] + 0.1 * normal(D_OUT, R)}
    upload, memory = strategy.end(at, start, trained)
    change = trained[PAIR.B] @ trained[PAIR.A] + shift(start, 1) / S
    u, s, vt = np.linalg.svd(change)
    np.testing.assert_allclose(upload[PAIR.B] @ upload[PAIR.A], (u[:, :R] * s[:R]) @ vt[:R], atol=1e-5)
    assert np.array_equal(memory[PAIR.A], upload[PAIR.A])
    assert memory["round"] == 1


@pytest.mark.parametrize(("number", "expected"), [(1, 1.0), (6, 0.6), (11, 0.2)])
def test_zeta_falls_along_half_a_cosine(number, expected):
    strategy = FedSmoothLora(zeta=1.0, zeta_min=0.2)
    assert strategy.zeta_at(Round(number, 10, LAYOUT)) == pytest.approx(expected)


def test_a_rank_without_2r_directions_is_refused(tiny_settings):
    with pytest.raises(UserError, match=r"adapter\.r: 20 is more than half of the 32 dimensions"):
        assemble(Config.from_dict({**tiny_settings, "adapter": {"name": "lora", "r": 20}, "strategy": {"name": "fedsmooth_lora"}}))


def test_full_gradients_are_autograds(tiny_settings):
    parts = assemble(Config.from_dict(tiny_settings))
    data, arrays = parts.worker.nodes[0].train, parts.adapted.read()
    batches = [np.arange(4), np.arange(4, 7)]
    found = dict(full_gradients(parts.adapted, parts.task, arrays, data, batches))
    parts.adapted.write(arrays)
    modules = dict(parts.adapted.model.named_modules())
    for module, G in found.items():
        weight = modules[module].base_layer.weight
        weight.requires_grad_(True)
        total = torch.zeros_like(weight)
        for rows in batches:
            inputs, labels = data.batch(rows, parts.adapted.base.tokenizer, "cpu")
            parts.adapted.model.eval()
            loss = torch.nn.functional.cross_entropy(parts.adapted.model(**inputs).logits, labels)
            total += torch.autograd.grad(loss, weight)[0] * len(rows) / 7
        weight.requires_grad_(False)
        assert np.abs(G).max() > 0
        np.testing.assert_allclose(G, total.numpy(), atol=1e-3 * np.abs(G).max())


def test_a_backbone_is_what_was_set_last(tiny_settings):
    """Two clients of a round shift it under the same names by different amounts."""
    parts = assemble(Config.from_dict(tiny_settings))
    arrays = parts.adapted.read()
    module = parts.adapted.layout().pairs[0].module
    left, right = merge_names(1, module)
    plain = evaluate.logits(parts.adapted, parts.test, 8)
    seen = []
    for seed in (1, 2):
        factors = {left: 10 * normal(32, 2, seed=seed).astype(np.float32), right: normal(2, 32, seed=seed).astype(np.float32)}
        shifted = {**arrays, **factors}
        parts.adapted.write(shifted)
        seen.append(evaluate.logits(parts.adapted, parts.test, 8))
    assert np.abs(seen[0] - seen[1]).max() > 1e-4
    parts.adapted.write(arrays)
    assert np.array_equal(plain, evaluate.logits(parts.adapted, parts.test, 8))


def test_a_run_with_returning_clients_resumes_to_the_same_bits(tiny_settings, tmp_path):
    import shutil

    settings = {**tiny_settings, "strategy": {"name": "fedsmooth_lora", "num_rounds": 5, "fraction_train": 0.5}}
    config = Config.from_dict(settings)
    whole = simulate(config, tmp_path / "run")
    assert whole.summary["rejected_updates"] == 0
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoint").glob("round-*"))[-1])
    again = simulate(config, tmp_path / "run", resume=True)
    assert digest(again.arrays) == digest(whole.arrays)
    alike = simulate(config, tmp_path / "again")
    assert digest(alike.arrays) == digest(whole.arrays)
