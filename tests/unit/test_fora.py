"""FoRA: the manifold, the scores, the average that stays on it, and the module names of other architectures."""

import json

import numpy as np
import pytest
import torch

from fedpeft import Config, simulate
from fedpeft.adapters.adapted import A_FACTOR, B_FACTOR
from fedpeft.adapters.fora import CHOICE, GATE, Fora, stacks
from fedpeft.base import Base
from fedpeft.records import Layout, TensorSpec
from fedpeft.simulations.assemble import assemble
from fedpeft.training import one
from fedpeft.training.job import Job
from fedpeft.training.stiefel import CayleyAdam, cayley, tangent

# --- Cayley-Adam ---------------------------------------------------------------------------------------------------------


def orthonormal(n, r, dtype=torch.float64, seed=0):
    return torch.linalg.qr(torch.randn(n, r, generator=torch.Generator().manual_seed(seed), dtype=dtype))[0]


def off_manifold(X):
    return float((X.T @ X - torch.eye(X.shape[1], dtype=X.dtype)).abs().max())


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("rate", [1e-3, 0.1])
def test_a_thousand_steps_stay_on_the_manifold_and_go_downhill(dtype, within, rate):
    target = orthonormal(48, 8, dtype, seed=1)
    X = torch.nn.Parameter(orthonormal(48, 8, dtype))
    optimizer = CayleyAdam([{"params": [X], "lr": rate}])
    losses = []
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (X - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert off_manifold(X.detach()) < within
    assert losses[-1] < 0.8 * losses[0]


def test_the_form_of_rank_2r_is_the_dense_cayley_step():
    X, M = orthonormal(20, 3), torch.randn(20, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    Q = tangent(X, M)
    W, eye = Q @ X.T - X @ Q.T, torch.eye(20, dtype=torch.float64)
    for a in (1e-3, 0.1, 2.0):
        dense = torch.linalg.solve(eye + a / 2 * W, (eye - a / 2 * W) @ X)
        torch.testing.assert_close(cayley(X, Q, a), dense, atol=1e-12, rtol=0)
    Y = X - 0.01 * W @ X
    for _ in range(5):  # the iteration of the paper's code
        Y = X - 0.005 * W @ (X + Y)
    torch.testing.assert_close(cayley(X, Q, 0.01), Y, atol=1e-8, rtol=0)


def test_the_optimiser_is_the_dense_one_of_the_paper_while_the_bound_does_not_bind():
    eta, eye = 1e-2, torch.eye(12, dtype=torch.float64)
    X = torch.nn.Parameter(orthonormal(12, 2))
    x, m, v = X.detach().clone(), torch.zeros(12, 2, dtype=torch.float64), 0.0
    optimizer = CayleyAdam([{"params": [X], "lr": eta}])
    for t in range(1, 8):
        G = torch.randn(12, 2, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        X.grad = G.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * G, 0.99 * v + 0.01 * float((G**2).sum())
        mh, sigma = m / (1 - 0.9**t), (v / (1 - 0.99**t)) ** 0.5 + 1e-8
        hat = mh @ x.T - 0.5 * x @ (x.T @ mh @ x.T)
        W = (hat - hat.T) / sigma
        x = torch.linalg.solve(eye + eta / 2 * W, (eye - eta / 2 * W) @ x)
        m = W @ x * sigma * (1 - 0.9**t)
        torch.testing.assert_close(X.detach(), x, atol=1e-11, rtol=0)


# --- the adapter -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fora_settings(tiny_settings):
    return {**tiny_settings, "adapter": {"name": "fora", "r": 4, "target_modules": ["query", "value"]}}


@pytest.fixture
def run(fora_settings, tmp_path):
    return simulate(Config.from_dict(fora_settings), tmp_path / "run")


def test_nothing_changes_at_first_and_only_the_gate_moves_in_the_first_step(fora_settings, tiny_settings):
    from fedpeft.training import evaluate

    training = {**tiny_settings["training"], "max_steps": 1}
    config = Config.from_dict({**fora_settings, "training": training})
    parts = assemble(config)
    start = parts.adapted.read()
    plain = assemble(Config.from_dict(tiny_settings))
    data = parts.worker.nodes[0].train
    np.testing.assert_array_equal(evaluate.logits(parts.adapted, data, 8), evaluate.logits(plain.adapted, data, 8))
    names, rules = parts.adapted.trained, parts.adapted.adapter.rules(parts.adapted.layout(), start)
    (trained,) = one.train(parts.adapted, parts.task, config, [Job(0, 1, start, names, data, rules=rules)])
    moved = {name for name in names if np.abs(trained.arrays[name] - start[name]).max() > 1e-6}
    assert {name for name in moved if name not in parts.adapted.head} == {name for name in names if name.endswith(GATE)}


def test_after_a_federated_run_B_is_orthonormal_and_A_has_the_singular_values(run):
    Bs = [name for name in run.arrays if name.endswith(B_FACTOR)]
    assert len(Bs) == 4
    for name in Bs:
        A, B = run.arrays[name.removesuffix(B_FACTOR) + A_FACTOR].astype(float), run.arrays[name].astype(float)
        assert np.abs(B.T @ B - np.eye(4)).max() < 1e-5
        np.testing.assert_allclose(np.linalg.svd(B @ A)[1][:4], np.linalg.svd(A)[1], rtol=1e-5)


def test_half_of_the_layers_train_travel_and_are_exported(run, fora_settings):
    parts = assemble(Config.from_dict(fora_settings))
    start = parts.adapted.read()
    chosen = run.arrays[CHOICE][1]
    assert chosen.tolist() in ([1.0, 0.0], [0.0, 1.0])
    number = int(np.argmax(chosen))
    for name in set(start) - set(parts.adapted.head):
        moved = bool((run.arrays[name] != start[name]).any())
        assert moved == (f".{number}." in name), name
    assert run.summary["first_trained_layer"] == number
    layers = run.summary["layers"]
    assert [layer["adapted"] for layer in layers] == [bool(on) for on in chosen]
    assert layers[number]["score"] == max(layer["score"] for layer in layers) > 0
    assert run.summary["trainable_parameters"] < parts.adapted.trainable_parameters
    config = json.loads((run.adapter_dir / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 2
    assert all(f".{number}." in module for module in config["target_modules"])


def test_the_report_shows_the_choice(run):
    page = (run.folder / "report.html").read_text()
    assert "the scores of the layers before round 1" in page


def test_layers_that_rest_stay_off_the_wire(run, fora_settings, tmp_path):
    whole = simulate(Config.from_dict({**fora_settings, "adapter": {**fora_settings["adapter"], "layers": 1.0}}), tmp_path / "whole")
    one_round = [json.loads((r.folder / "rounds.jsonl").read_text().splitlines()[1]) for r in (run, whole)]
    per_layer = 4 * 2 * (4 * 32 + 32 * 4 + 1)
    for key in ("bytes_up", "bytes_down"):
        assert one_round[1][key] - one_round[0][key] > 0.8 * per_layer * 4  # clients


def test_scores_are_the_dense_ones_and_pool_exactly(fora_settings):
    parts = assemble(Config.from_dict({**fora_settings, "adapter": {**fora_settings["adapter"], "score_examples": 1000}}))
    adapted, task, config = parts.adapted, parts.task, parts.worker.config
    survey, layout = adapted.adapter.survey(), adapted.layout()
    answers = [survey.measure(adapted, task, parts.worker.nodes[k].train, config.training) for k in range(4)]
    got = survey.finish({key: sum(answer[key] for answer in answers) for key in answers[0]}, layout)[CHOICE][0]

    wanted, count = np.zeros(2), 0
    blocks = [adapted.model.get_submodule(f"base_model.model.bert.encoder.layer.{n}") for n in (0, 1)]
    own = {id(p) for p in adapted.parameters.values()}
    weights = [[p for p in block.parameters() if id(p) not in own] for block in blocks]
    for parameter in (p for some in weights for p in some):
        parameter.requires_grad_(True)
    for k in range(4):
        data = parts.worker.nodes[k].train
        for row in range(len(data)):
            inputs, labels = data.batch(np.array([row]), adapted.base.tokenizer, "cpu")
            gradients = torch.autograd.grad(task.losses(adapted.model, inputs, labels).sum(), [p for some in weights for p in some])
            squares = [float(g.square().sum()) for g in gradients]
            wanted += [sum(squares[: len(weights[0])]), sum(squares[len(weights[0]) :])]
            count += 1
    np.testing.assert_allclose(got, wanted / count, rtol=1e-4)


def test_scoring_leaves_the_base_without_gradients(fora_settings):
    parts = assemble(Config.from_dict(fora_settings))
    parts.adapted.adapter.survey().measure(parts.adapted, parts.task, parts.worker.nodes[0].train, parts.worker.config.training)
    own = {id(p) for p in parts.adapted.parameters.values()}
    assert not [p for p in parts.adapted.model.parameters() if id(p) not in own and (p.requires_grad or p.grad is not None)]


def test_the_score_of_a_batch_is_not_that_of_its_examples(fora_settings):
    parts = assemble(Config.from_dict(fora_settings))
    scores = {}
    for score in ("example", "batch"):
        survey = Fora(r=4, score=score, score_examples=4).survey()
        scores[score] = survey.measure(parts.adapted, parts.task, parts.test, parts.worker.config.training)["scores"]
    assert (scores["example"] > 1.05 * scores["batch"]).all()


def test_settling_keeps_the_product_and_returns_to_the_manifold():
    generator = np.random.default_rng(0)
    arrays = {f"m.layer.0.q{A_FACTOR}": generator.normal(size=(3, 9)), f"m.layer.0.q{B_FACTOR}": generator.normal(size=(7, 3))}
    settled = Fora(r=3).settle(arrays, Layout({name: TensorSpec(a.shape, "float64") for name, a in arrays.items()}))
    A, B = (settled[f"m.layer.0.q{factor}"] for factor in (A_FACTOR, B_FACTOR))
    np.testing.assert_allclose(B.T @ B, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(B @ A, arrays[f"m.layer.0.q{B_FACTOR}"] @ arrays[f"m.layer.0.q{A_FACTOR}"], atol=1e-12)


def test_one_layer_at_least_and_the_lower_one_on_a_tie():
    survey = Fora(r=4, layers=0.1).survey()
    layout = Layout({f"m.layer.{n}.q{B_FACTOR}": TensorSpec((4, 4), "float32") for n in range(3)})
    chosen = survey.finish({"scores": np.array([1.0, 3.0, 3.0]), "examples": np.array([1.0])}, layout)[CHOICE][1]
    assert chosen.tolist() == [0.0, 1.0, 0.0]


def test_scoring_costs_less_than_a_hundredth_of_the_default_run():
    """Counted, a client: forward and whole backward of the scored examples, against every local step of the run."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertConfig, BertForSequenceClassification

    default, fora = Config.load(overrides=["adapter.name=fora"]), Fora()
    model = BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=100, num_labels=10)
    )
    model.requires_grad_(False)
    tokens = torch.ones(1, default.data.max_length, dtype=torch.long)

    def flops(trained):
        for parameter in trained:
            parameter.requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens).logits.sum().backward()
        model.requires_grad_(False)
        return counter.get_total_flops()

    scoring = fora.score_examples * flops(list(model.bert.encoder.parameters()))
    steps = default.strategy.num_rounds * default.training.max_steps * default.training.per_device_train_batch_size
    half_of_the_backward = flops([model.bert.encoder.layer[3].attention.self.query.weight])  # as if the upper half were chosen
    assert scoring < 0.01 * steps * half_of_the_backward


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tiny_models():
    import transformers as tf

    grouped = {**SMALL, "num_key_value_heads": 2, "vocab_size": 50, "pad_token_id": 0}
    yield "bert", tf.BertForSequenceClassification(tf.BertConfig(vocab_size=50, **SMALL)), ["query", "value"]
    yield "llama", tf.LlamaForSequenceClassification(tf.LlamaConfig(**grouped)), ["q_proj", "v_proj", "down_proj"]
    yield "qwen2", tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**grouped)), ["q_proj", "v_proj", "down_proj"]
    yield "gemma", tf.GemmaForSequenceClassification(tf.GemmaConfig(head_dim=8, **grouped)), ["q_proj", "v_proj", "down_proj"]
    yield "vit", tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, **SMALL)), "all-linear"


@pytest.mark.parametrize("which", range(5), ids=["bert", "llama", "qwen2", "gemma", "vit"])
def test_layers_are_found_by_the_module_names_of(which):
    name, model, targets = list(tiny_models())[which]
    model.requires_grad_(False)
    adapter = Fora(r=4, target_modules=targets)
    adapted = adapter.attach(Base(model, None, "cpu", name), "SEQ_CLS", 0, train_head=True)
    layout = adapted.layout()
    assert [number for _, number in stacks(layout)] == [0, 1]
    choice = adapter.survey().finish({"scores": np.array([1.0, 2.0]), "examples": np.array([1.0])}, layout)
    adapted.write(choice)
    assert adapted.first_trained_layer == 1
    lower = {name for name in layout.tensors if ".0." in name and name not in layout.head}
    assert adapted.resting == lower
    assert lower
