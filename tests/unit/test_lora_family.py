"""LoRA-FA's projected step, initialisations that take something out of the base, convolutions, FRoD's rates."""

import numpy as np
import pytest
import torch

from fedpeft import Config, simulate
from fedpeft.adapters.inits import FullGradients, LoraGa, Olora, Pissa
from fedpeft.records import merge_names
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate, one
from fedpeft.training.gradients import full_gradients
from fedpeft.training.job import Job, batches

# --- LoRA-FA -------------------------------------------------------------------------------------------------------------


def one_step(tiny_settings, adapter, optimizer="sgd"):
    """(parts, start, arrays after one step, full gradients at the start) of client 0."""
    training = {**tiny_settings["training"], "optimizer": optimizer, "max_grad_norm": None, "learning_rate": 0.1, "max_steps": 1}
    config = Config.from_dict({**tiny_settings, "training": training, "adapter": {"target_modules": ["query", "value"], **adapter}})
    parts = assemble(config)
    adapted, data = parts.adapted, parts.worker.nodes[0].train
    adapted.model.train = lambda mode=True: adapted.model  # without dropout, which would draw two different networks
    start = adapted.read()
    layout = adapted.layout()
    resting = adapted.adapter.resting(layout, start)
    names = tuple(name for name in adapted.trained if name not in resting)
    job = Job(0, 1, start, names, data, rules=adapted.adapter.rules(layout, start))
    gradients = dict(full_gradients(adapted, parts.task, start, data, batches(config, job)[0]))
    (trained,) = one.train(adapted, parts.task, config, [job])
    return parts, start, {**start, **trained.arrays}, gradients


@pytest.mark.parametrize("own", [{"lora_alpha": 16}, {"lora_alpha": 3}, {"use_rslora": True}])
def test_one_sgd_step_of_lora_fa_is_the_full_gradient_projected_on_the_rows_of_A(own, tiny_settings):
    parts, start, after, gradients = one_step(tiny_settings, {"name": "lora_fa", "r": 4, **own})
    for pair in parts.adapted.layout().pairs:
        A, G = start[pair.A].astype(float), gradients[pair.module].astype(float)
        np.testing.assert_array_equal(after[pair.A], start[pair.A])
        step = pair.s * (after[pair.B] - start[pair.B]).astype(float) @ A
        projected = -0.1 * G @ np.linalg.pinv(A) @ A
        assert np.linalg.norm(step - projected) < 1e-5 * np.linalg.norm(projected)
        assert np.linalg.norm(step + 0.1 * G) > 0.1 * np.linalg.norm(step), "the projection leaves something out"


def test_without_the_correction_the_step_is_another(tiny_settings):
    parts, start, after, gradients = one_step(tiny_settings, {"name": "lora", "r": 4})
    pair = parts.adapted.layout().pairs[0]
    A, G = start[pair.A].astype(float), gradients[pair.module].astype(float)
    step = pair.s * (after[pair.B] - start[pair.B]).astype(float) @ A
    projected = -0.1 * G @ np.linalg.pinv(A) @ A
    assert np.linalg.norm(step - projected) > 0.1 * np.linalg.norm(projected)


def test_why_not_pefts_optimiser_it_multiplies_in_bfloat16():
    """If this fails, PEFT has become exact, and ours can go."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_lorafa_optimizer

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), LoraConfig(r=8, target_modules=["0"]))
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1.0)
    G = torch.randn(64, 8)
    B.grad = G.clone()
    optimizer.step()
    (state,) = (state for state in optimizer.state.values() if "exp_avg_B" in state)
    got = state["exp_avg_B"].double() / 0.1
    wanted = G.double() @ torch.linalg.inv(A @ A.T) / layer.scaling["default"] ** 2
    assert 1e-5 < float((got - wanted).norm() / wanted.norm()) < 1e-1


def test_lora_fa_sends_half_and_A_stays(tiny_settings, tmp_path):
    runs = {
        name: simulate(Config.from_dict({**tiny_settings, "adapter": {**tiny_settings["adapter"], "name": name}}), tmp_path / name)
        for name in ("lora", "lora_fa")
    }
    start = assemble(runs_config := Config.load(tmp_path / "lora_fa" / "config.yaml")).adapted.read()
    assert runs_config.adapter.name == "lora_fa"
    for name in start:
        if name.endswith("lora_A.weight"):
            np.testing.assert_array_equal(runs["lora_fa"].arrays[name], start[name])
    assert runs["lora_fa"].summary["bytes_up"] < runs["lora"].summary["bytes_up"]
    assert runs["lora_fa"].summary["bytes_down"] < runs["lora"].summary["bytes_down"]
    last = __import__("json").loads((tmp_path / "lora_fa" / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["report"]["aggregation_error"] < 1e-6


# --- initialisations -----------------------------------------------------------------------------------------------------


def test_pissa_is_the_leading_part_of_the_weight_and_olora_its_basis():
    W = np.random.default_rng(0).normal(size=(9, 12))
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    B, A = Pissa().factors(W, 3, 2.0)
    np.testing.assert_allclose(2.0 * B @ A, U[:, :3] * S[:3] @ Vt[:3], atol=1e-8)
    B, A = Olora().factors(W, 3, 2.0)
    np.testing.assert_allclose(B.T @ B, np.eye(3), atol=1e-12)
    np.testing.assert_allclose((W - B @ A).T @ B, 0, atol=1e-12)


def test_lora_ga_starts_as_the_paper_says():
    """B0 and A0 have orthogonal columns and rows of one length, of disjoint singular directions of the gradient."""
    from fedpeft.records import Layout, Pair, TensorSpec

    G = np.random.default_rng(0).normal(size=(16, 12))
    U, _, Vt = np.linalg.svd(G)
    specs = {"m.lora_A.weight": TensorSpec((2, 12), "float32"), "m.lora_B.weight": TensorSpec((16, 2), "float32")}
    layout = Layout(specs, (Pair("m", "m.lora_A.weight", "m.lora_B.weight", s=2.0, r=2),))
    found = FullGradients().finish({"m": G}, layout)
    A, B = found["m.lora_A.weight"], found["m.lora_B.weight"]
    c = 16**0.25 / 16**0.5
    np.testing.assert_allclose(B.T @ B, c**2 * np.eye(2), atol=1e-6)
    np.testing.assert_allclose(np.abs(A @ Vt.T)[:, :2], c * np.eye(2), atol=1e-6)
    np.testing.assert_allclose(np.abs(B.T @ U)[:, 2:4], c * np.eye(2), atol=1e-6)
    left, right = merge_names(0, "m")
    np.testing.assert_allclose(found[left] @ found[right] + 2.0 * B @ A, 0, atol=1e-6)


def test_examples_of_a_short_batch_weigh_no_more_than_others(tiny_settings):
    """Eleven examples in batches of eight and three, and in one batch."""
    settings = {**tiny_settings, "adapter": {**tiny_settings["adapter"], "init": "lora_ga"}}
    parts = assemble(Config.from_dict(settings))
    found = [
        LoraGa().survey().measure(parts.adapted, parts.task, parts.test.take(np.arange(11)), training)
        for training in (parts.worker.config.training.model_copy(update={"per_device_train_batch_size": size}) for size in (8, 16))
    ]
    for module in found[0]:
        np.testing.assert_allclose(found[0][module], found[1][module], atol=1e-5 * np.abs(found[1][module]).max())


def test_pooled_gradients_are_those_of_all_examples(tiny_settings):
    parts = assemble(Config.from_dict({**tiny_settings, "adapter": {**tiny_settings["adapter"], "init": "lora_ga"}}))
    adapted, training = parts.adapted, parts.worker.config.training
    survey = LoraGa().survey()
    assert survey.expects(adapted.layout()).keys() == {pair.module for pair in adapted.layout().pairs}
    answers = [survey.measure(adapted, parts.task, parts.worker.nodes[k].train, training) for k in range(4)]
    for pair in adapted.layout().pairs:
        pooled = sum(answer[pair.module] for answer in answers)
        assert pooled.shape == (32, 32)
        assert np.linalg.norm(pooled) > 0


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
@pytest.mark.parametrize("strategy", ["fedavg", "fedex_lora", "ffa_lora"])
def test_an_initialisation_changes_no_logit_before_training(init, strategy, tiny_settings, tmp_path):
    settings = {**tiny_settings, "strategy": {"name": strategy, "num_rounds": 1}}
    shifted = simulate(Config.from_dict({**settings, "adapter": {**settings["adapter"], "init": init}}), tmp_path / "shifted")
    plain = assemble(Config.from_dict(settings))
    before = evaluate.evaluate(plain.adapted, plain.task, plain.adapted.read(), plain.test, 8)
    assert shifted.summary["initial"]["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert shifted.summary["rejected_updates"] == 0


def test_the_base_keeps_its_weights(tiny_settings):
    parts = assemble(Config.from_dict({**tiny_settings, "adapter": {**tiny_settings["adapter"], "init": "pissa"}}))
    plain = assemble(Config.from_dict(tiny_settings))
    assert parts.adapted.base.fingerprint == plain.adapted.base.fingerprint
    for pair in plain.adapted.layout().pairs:
        np.testing.assert_array_equal(parts.adapted.weight(pair.module), plain.adapted.weight(pair.module))


# --- convolutions, rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_adapters_on_a_convolution_run_and_reload(name, tiny_settings, tiny_bert, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Config, DebertaV2Model

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = DebertaV2Config(vocab_size=len(tokenizer), pooler_hidden_size=32, conv_kernel_size=3, **sizes)
        DebertaV2Model(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = {"name": name, "r": 4, "target_modules": r".*conv[.]conv"}
    settings = {**tiny_settings, "model": {"name": str(tmp_path / "base")}, "adapter": adapter, "strategy": {"num_rounds": 1}}
    config = Config.from_dict(settings)
    run = simulate(config, tmp_path / "run")
    assert any(array.ndim == 3 for array in run.arrays.values())
    parts = assemble(config)
    parts.adapted.write(run.arrays)
    ours = evaluate.logits(parts.adapted, parts.test, 7)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    parts.adapted.model = PeftModel.from_pretrained(base, run.adapter_dir).eval()
    np.testing.assert_allclose(ours, evaluate.logits(parts.adapted, parts.test, 7), atol=1e-5)


def test_frod_moves_S_at_a_tenth_of_lambdas_rate(tiny_settings):
    steps = {}
    for factor in (0.1, 1.0):
        _, start, after, _ = one_step_of_frod(tiny_settings, factor)
        steps[factor] = {name: after[name] - start[name] for name in start}
    for name in steps[1.0]:
        share = 0.1 if name.endswith("_s_values") else 1.0
        np.testing.assert_allclose(steps[0.1][name], share * steps[1.0][name], atol=1e-6)
    assert any(name.endswith("_s_values") and step.any() for name, step in steps[1.0].items())


def one_step_of_frod(tiny_settings, factor):
    training = {**tiny_settings["training"], "optimizer": "sgd", "max_grad_norm": None, "learning_rate": 1e-3, "max_steps": 1}
    adapter = {"name": "frod", "s_rate_factor": factor, "target_modules": ["query", "value"]}
    config = Config.from_dict({**tiny_settings, "training": training, "adapter": adapter})
    parts = assemble(config)
    start = parts.adapted.read()
    rules = parts.adapted.adapter.rules(parts.adapted.layout(), start)
    job = Job(0, 1, start, parts.adapted.trained, parts.worker.nodes[0].train, rules=rules)
    (trained,) = one.train(parts.adapted, parts.task, config, [job])
    return parts, start, trained.arrays, None
