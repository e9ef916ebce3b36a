"""Strategies in which what travels is not what trains: FedASK, FedSA-LoRA, SLoRA, Fed-SB, SCAFFOLD. Both halves, against dense matrices."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings

from fedpeft import Config, UserError, simulate
from fedpeft.lookup import TABLES, find
from fedpeft.records import BESIDE, Layout, TensorSpec, Update, sparse_name
from fedpeft.simulations.assemble import assemble
from fedpeft.strategies.fed_ask import FedAsk
from fedpeft.strategies.fed_sb import FedSb
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.fedsa_lora import FedsaLora
from fedpeft.strategies.scaffold import CONTROL, Scaffold
from fedpeft.strategies.slora import Slora
from fedpeft.strategies.strategy import Round, Turn
from fedpeft.training import one
from fedpeft.training.job import Job

from .test_strategies import cases, draw_case, product, relative


def no_gradients(arrays, batches):
    raise AssertionError("nothing here asks for gradients")


def turn(at, received, memory=None, step_sizes=1.0):
    return Turn(at, received, memory or {}, no_gradients, step_sizes)


# --- FedASK ----------------------------------------------------------------------------------------------------------


def ask(strategy, case, lost=()):
    """The two hops of a round; clients of `lost` do not answer the second."""
    names = strategy.trains(tuple(case.received), case.at)
    turns, updates = {}, []
    for client, (tensors, n) in enumerate(zip(case.full, case.counts, strict=True)):
        trained = {name: tensors[name] for name in names}
        upload, memory = strategy.end(turn(case.at, case.received), case.received, trained)
        assert Layout.specs(upload) == dict(sorted(strategy.uploads(tuple(case.received), case.at).items()))
        turns[client] = turn(case.at, case.received, memory)
        updates.append(Update(1, client, upload, n))
    question = strategy.second(updates, case.at)
    both = []
    for update in updates:
        answer = strategy.answer(turns[update.client], question)
        assert Layout.specs(answer) == dict(sorted(strategy.answers(case.at).items()))
        if update.client not in lost:
            both.append(dataclasses.replace(update, arrays={**update.arrays, **answer}))
    combined = strategy.combine(both, {**case.received, **question}, case.at)
    return strategy.apply(case.received, combined.arrays, {})[0]


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_a_sketch_as_wide_as_the_update_gives_its_best_rank(case):
    r = len(case.received[case.layout.pairs[0].A])
    after = ask(FedAsk(sketch=r * len(case.full)), case)
    for pair in case.layout.pairs:
        wanted = case.ideal(FedAvg(), pair)
        best = np.sqrt((np.linalg.svd(wanted, compute_uv=False)[r:] ** 2).sum())
        assert np.linalg.norm(product(after, pair) - wanted) <= best + 1e-7 * np.linalg.norm(wanted)


@given(case=cases)
@settings(max_examples=25, deadline=None)
def test_with_a_shared_A_a_sketch_of_rank_r_is_exact(case):
    strategy = FedAsk(trained="B")
    after = ask(strategy, case)
    for pair in case.layout.pairs:
        assert relative(product(after, pair), case.ideal(strategy, pair)) < 1e-6


def test_a_narrow_sketch_of_unlike_clients_loses_something():
    case = draw_case(3, clients=5, d_out=30, d_in=30)
    errors = [
        relative(product(ask(FedAsk(sketch=m), case), pair), case.ideal(FedAvg(), pair)) for m in (2, 10) for pair in case.layout.pairs
    ]
    assert min(errors[:2]) > max(errors[2:]) + 0.02


def test_the_head_is_the_mean_and_the_sketch_is_never_drawn_from_data():
    case = draw_case(4)
    after = ask(FedAsk(), case)
    mean = sum(n * tensors["head.weight"] for n, tensors in zip(case.counts, case.full, strict=True)) / sum(case.counts)
    np.testing.assert_allclose(after["head.weight"], mean, atol=1e-12)
    pair = case.layout.pairs[0]
    later = dataclasses.replace(case.at, number=7)
    assert np.array_equal(FedAsk().omega(case.at, pair), FedAsk().omega(later, pair))
    assert not np.array_equal(FedAsk().omega(case.at, pair), FedAsk().omega(dataclasses.replace(case.at, seed=1), pair))


def test_a_client_that_is_gone_after_the_first_hop_leaves_a_right_mean_of_the_others():
    case = draw_case(5, clients=3, d_out=8, d_in=8)
    rest = dataclasses.replace(case, full=case.full[:2], counts=case.counts[:2])
    after = ask(FedAsk(sketch=8), case, lost=(2,))
    r = 2
    for pair in case.layout.pairs:
        wanted = rest.ideal(FedAvg(), pair)
        best = np.sqrt((np.linalg.svd(wanted, compute_uv=False)[r:] ** 2).sum())
        assert np.linalg.norm(product(after, pair) - wanted) <= best + 1e-7 * np.linalg.norm(wanted)


def test_two_hops_in_a_run_and_a_client_without_its_memory_is_left_out_alone(tiny_settings, tmp_path):
    from fedpeft import wire
    from fedpeft.records import Assignment, Failure

    config = Config.from_dict({**tiny_settings, "strategy": {"name": "fed_ask", "num_rounds": 2}})
    run = simulate(config, tmp_path / "run")
    assert run.summary["rejected_updates"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    plain = sum(array.nbytes for name, array in run.arrays.items())
    assert lines[1]["bytes_down"] > 4 * 1.1 * plain, "what is asked the second time is counted"
    parts = assemble(config)
    (answer,) = parts.worker.answer([Assignment(wire.SECOND, 1, 0, {})])
    assert isinstance(answer, Failure)
    assert answer.reason.startswith("missing memory")


# --- FedSA-LoRA ------------------------------------------------------------------------------------------------------


def test_fedsa_shares_A_and_leaves_B_and_head_at_home():
    case = draw_case(6)
    strategy, updates, memories = FedsaLora(), [], []
    for client, (tensors, n) in enumerate(zip(case.full, case.counts, strict=True)):
        upload, memory = strategy.end(turn(case.at, case.received), case.received, tensors)
        assert set(upload) == set(strategy.uploads(tuple(case.received), case.at)) == {pair.A for pair in case.layout.pairs}
        assert set(memory) == set(case.received) - set(upload)
        updates.append(Update(1, client, upload, n))
        memories.append(memory)
    after = strategy.apply(case.received, strategy.combine(updates, case.received, case.at).arrays, {})[0]
    for name in case.received:
        if "lora_A" in name:
            wanted = sum(n * tensors[name] for n, tensors in zip(case.counts, case.full, strict=True)) / sum(case.counts)
            np.testing.assert_allclose(after[name], wanted, atol=1e-12)
        else:
            assert np.array_equal(after[name], case.received[name])
    own = strategy.own(turn(case.at, after, memories[1]))
    for name in own:
        assert np.array_equal(own[name], after[name] if "lora_A" in name else case.full[1][name])


def test_personal_models_are_measured_and_exported(tiny_settings, tiny_bert, tmp_path):
    """Each folder reloads with stock PEFT to the client's own logits: the shared A with that client's B and head."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from fedpeft.server.checkpoint import latest
    from fedpeft.training import evaluate

    given = {**tiny_settings, "data": {**tiny_settings["data"], "validation_fraction": 0.25}}
    given["strategy"] = {"name": "fedsa_lora", "num_rounds": 3}
    given["training"] = {**tiny_settings["training"], "head_init": "class_statistics"}
    config = Config.from_dict(given)
    run = simulate(config, tmp_path / "run")
    assert run.summary["rejected_updates"] == 0
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    assert "clients_validation_accuracy" in lines[-1]["report"]
    shared = sum(array.nbytes for name, array in run.arrays.items() if "lora_A" in name)
    assert 4 * shared < lines[2]["bytes_up"] < 4 * (shared + 2000)
    parts = assemble(config)
    memories = latest(run.folder / "checkpoint").clients
    inputs, _ = parts.test.batch(np.arange(len(parts.test)), parts.adapted.base.tokenizer, "cpu")
    all_logits = []
    for client in range(4):
        own = {key.partition("/")[2]: array for key, array in memories.items() if key.startswith(f"{client}/")}
        parts.adapted.write({**run.arrays, **own})
        ours = evaluate.logits(parts.adapted, parts.test, 8)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
        model = PeftModel.from_pretrained(base, run.folder / "personal" / str(client)).eval()
        with torch.no_grad():
            assert np.abs(ours - model(**inputs).logits.numpy()).max() < 1e-5 * np.abs(ours).max()
        all_logits.append(ours)
    assert np.abs(all_logits[0] - all_logits[1]).max() > 1e-3


def test_a_personal_run_resumes_to_the_same_bits(tiny_settings, tmp_path):
    import shutil

    from fedpeft.arrays import digest

    config = Config.from_dict({**tiny_settings, "strategy": {"name": "fedsa_lora", "num_rounds": 4, "fraction_train": 0.5}})
    whole = simulate(config, tmp_path / "run")
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoint").glob("round-*"))[-1])
    shutil.rmtree(tmp_path / "run" / "personal")
    again = simulate(config, tmp_path / "run", resume=True)
    assert digest(again.arrays) == digest(whole.arrays)


# --- SLoRA -----------------------------------------------------------------------------------------------------------


def draw_sparse(seed, strategy, **shape):
    """A case whose tensors include the sparse values of the strategy."""
    case = draw_case(seed, **shape)
    positions = strategy.sparse(case.layout, case.at.seed)
    generator = np.random.default_rng(seed)
    names = {sparse_name(module): len(where) for module, where in positions.items()}
    specs = {**case.layout.tensors, **{name: TensorSpec((count,), "float64") for name, count in names.items()}}
    received = {**case.received, **{name: np.zeros(count) for name, count in names.items()}}
    full = [{**tensors, **{name: generator.normal(size=count) for name, count in names.items()}} for tensors in case.full]
    layout = dataclasses.replace(case.layout, tensors=specs)
    return dataclasses.replace(case, layout=layout, received=received, full=full), positions


@pytest.mark.parametrize("rslora", [False, True])
def test_at_the_switch_lora_starts_from_the_best_rank_of_the_mean_sparse_update(rslora):
    strategy = Slora(warmup_rounds=2, density=0.4)
    case, positions = draw_sparse(7, strategy, clients=3, d_out=9, d_in=8, rslora=rslora)
    p = np.array(case.counts) / sum(case.counts)
    means = {}
    for number in (1, 2):
        at = dataclasses.replace(case, number=number)
        names = strategy.trains(tuple(case.received), at.at)
        assert not any("lora" in name for name in names)
        means[number], _ = at.step(strategy)
    for pair in case.layout.pairs:
        name = sparse_name(pair.module)
        wanted = np.zeros((case.received[pair.B].shape[0], case.received[pair.A].shape[1]))
        wanted.flat[positions[pair.module]] = sum(share * tensors[name] for share, tensors in zip(p, case.full, strict=True))
        np.testing.assert_allclose(means[1][name], wanted.flat[positions[pair.module]], atol=1e-12)
        assert np.array_equal(means[1][pair.A], case.received[pair.A])
        U, S, Vt = np.linalg.svd(wanted, full_matrices=False)
        np.testing.assert_allclose(product(means[2], pair), (U[:, :2] * S[:2]) @ Vt[:2], atol=1e-9)
        assert not means[2][name].any(), "the weights are those of the base again"


def test_after_the_switch_slora_is_fedavg():
    strategy = Slora(warmup_rounds=2, density=0.4)
    case, _ = draw_sparse(8, strategy)
    later = dataclasses.replace(case, number=3)
    after, _ = later.step(strategy)
    plain, _ = later.step(FedAvg())
    for pair in case.layout.pairs:
        np.testing.assert_array_equal(after[pair.A], plain[pair.A])
        np.testing.assert_array_equal(after[pair.B], plain[pair.B])
        assert np.array_equal(after[sparse_name(pair.module)], case.received[sparse_name(pair.module)])


def test_positions_are_the_seeds_and_as_many_as_lora_has_numbers():
    case = draw_case(9, d_out=40, d_in=30, r=2)
    positions = Slora().sparse(case.layout, 0)
    for pair in case.layout.pairs:
        where = positions[pair.module]
        assert len(where) == len(set(where.tolist())) == 2 * (40 + 30)
        assert where.min() >= 0
        assert where.max() < 1200
        assert np.array_equal(where, Slora().sparse(case.layout, 0)[pair.module])
        assert not np.array_equal(where, Slora().sparse(case.layout, 1)[pair.module])


def test_sparse_values_act_as_a_dense_change_of_the_weight_and_train(tiny_settings, tmp_path):
    import torch

    from fedpeft.training import evaluate

    config = Config.from_dict({**tiny_settings, "strategy": {"name": "slora", "num_rounds": 3, "warmup_rounds": 2}})
    parts = assemble(config)
    positions = parts.strategy.sparse(parts.adapted.layout(), config.seed)
    arrays = parts.adapted.read()
    module = parts.adapted.layout().pairs[0].module
    arrays[sparse_name(module)] = np.random.default_rng(0).normal(size=len(positions[module])).astype(np.float32)
    parts.adapted.write(arrays)
    sparse = evaluate.logits(parts.adapted, parts.test, 8)
    weight = dict(parts.adapted.model.named_modules())[module].base_layer.weight
    parts.adapted.write({**arrays, sparse_name(module): 0 * arrays[sparse_name(module)]})
    with torch.no_grad():
        weight.view(-1)[torch.from_numpy(positions[module])] += torch.from_numpy(arrays[sparse_name(module)])
        dense = evaluate.logits(parts.adapted, parts.test, 8)
    np.testing.assert_allclose(sparse, dense, atol=1e-5)
    run = simulate(config, tmp_path / "run")
    assert run.summary["rejected_updates"] == 0
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    assert min(line["update_norm"] for line in lines[1:]) > 0.01, "both stages move"


def test_a_run_stopped_in_the_sparse_stage_exports_what_it_learned(tiny_settings, tiny_bert, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from fedpeft.training import evaluate

    config = Config.from_dict({**tiny_settings, "strategy": {"name": "slora", "num_rounds": 3, "warmup_rounds": 2}})
    parts = assemble(config)
    generator = np.random.default_rng(1)
    arrays = {
        name: generator.normal(size=array.shape).astype(np.float32) if name.startswith("sparse.") else array
        for name, array in parts.adapted.read().items()
    }
    parts.adapted.write(arrays)
    ours = evaluate.logits(parts.adapted, parts.test, 8)
    parts.adapted.save(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3), tmp_path / "adapter"
    ).eval()
    inputs, _ = parts.test.batch(np.arange(len(parts.test)), parts.adapted.base.tokenizer, "cpu")
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(**inputs).logits.numpy(), atol=1e-4)


def test_slora_without_a_second_stage_is_refused():
    with pytest.raises(UserError, match="LoRA would never train"):
        Config.from_dict({"strategy": {"name": "slora", "num_rounds": 3, "warmup_rounds": 3}})


# --- Fed-SB ----------------------------------------------------------------------------------------------------------


def draw_cores(seed, r=3):
    case = draw_case(seed, r=r, clients=4)
    pairs = tuple(dataclasses.replace(pair, core=f"{pair.module}.lora_A.core") for pair in case.layout.pairs)
    generator = np.random.default_rng(seed)
    cores = {pair.core: generator.normal(size=(r, r)) for pair in pairs}
    specs = {**case.layout.tensors, **{name: TensorSpec((r, r), "float64") for name in cores}}
    full = [{**tensors, **{name: generator.normal(size=(r, r)) for name in cores}} for tensors in case.full]
    layout = dataclasses.replace(case.layout, pairs=pairs, tensors=specs)
    return dataclasses.replace(case, layout=layout, received={**case.received, **cores}, full=full)


def test_the_mean_of_cores_is_the_mean_of_updates():
    case = draw_cores(10)
    strategy = FedSb()
    names = [name for name in case.received if name.endswith("core") or name.startswith("head")]
    updates = [Update(1, k, {name: case.full[k][name] for name in names}, n) for k, n in enumerate(case.counts)]
    combined = strategy.combine(updates, case.received, case.at)
    after = {**case.received, **combined.arrays}
    for pair in case.layout.pairs:
        A, B = case.received[pair.A], case.received[pair.B]
        wanted = sum(n / sum(case.counts) * pair.s * B @ tensors[pair.core] @ A for n, tensors in zip(case.counts, case.full, strict=True))
        assert relative(pair.s * after[pair.B] @ after[pair.core] @ after[pair.A], wanted) < 1e-12
    assert combined.report["aggregation_error"] < 1e-12


def test_fed_sb_wants_cores_and_strategies_of_factors_do_not():
    case = draw_cores(11)
    with pytest.raises(UserError, match="use adapter lora_sb"):
        FedSb().check(draw_case(0).layout)
    FedSb().check(case.layout)
    FedAvg().check(case.layout)
    for target in (find("strategy", name) for name in TABLES["strategy"]):
        strategy = target(of="factors") if "of" in target.model_fields else target()
        if strategy.of_factors:
            with pytest.raises(UserError, match="trains the core between them"):
                strategy.check(case.layout)


@pytest.mark.parametrize(
    ("adapter", "strategy", "says"),
    [("lora", "fed_sb", "use adapter lora_sb"), ("lora_sb", "flora", "trains the core"), ("lora_sb", "fed_ask", "trains the core")],
)
def test_cores_and_strategies_that_do_not_fit_are_refused_before_anything_is_loaded(adapter, strategy, says):
    with pytest.raises(UserError, match=says):
        Config.from_dict({"adapter": {"name": adapter}, "strategy": {"name": strategy}})


SB = {"name": "lora_sb", "r": 4, "target_modules": ["query", "value"]}


@pytest.mark.parametrize("start", ["gradient", "orthonormal"])
def test_cores_learn_travel_alone_and_fold_to_a_plain_lora(start, tiny_settings, tiny_bert, tmp_path):
    import torch
    from peft import PeftModel
    from safetensors.numpy import load_file
    from transformers import AutoModelForSequenceClassification

    from fedpeft.training import evaluate

    given = {**tiny_settings, "adapter": {**SB, "start": start}, "strategy": {"name": "fed_sb"}}
    run = simulate(Config.from_dict(given), tmp_path / "run")
    assert run.summary["rejected_updates"] == 0
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    frozen = sum(array.nbytes for name, array in run.arrays.items() if name.endswith(("lora_A.weight", "lora_B.weight")))
    rest = sum(array.nbytes for array in run.arrays.values()) - frozen
    once = lines[1]["bytes_down"] - lines[2]["bytes_down"]
    assert 4 * frozen < once < 4 * (frozen + 2000) if start == "gradient" else abs(once) < 100, "what the seed does not give travels once"
    assert 4 * rest < lines[2]["bytes_up"] < 4 * (rest + 2000)
    for name, array in run.arrays.items():
        if name.endswith("lora_B.weight"):
            np.testing.assert_allclose(array.T @ array, np.eye(4), atol=1e-5)
    saved = load_file(run.adapter_dir / "adapter_model.safetensors")
    assert not any(name.endswith("core") for name in saved)
    parts = assemble(Config.from_dict(given))
    parts.adapted.write(run.arrays)
    ours = evaluate.logits(parts.adapted, parts.test, 8)
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3), run.adapter_dir).eval()
    inputs, _ = parts.test.batch(np.arange(len(parts.test)), parts.adapted.base.tokenizer, "cpu")
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(**inputs).logits.numpy(), atol=1e-5)


def test_the_gradient_start_is_the_papers_whoever_holds_which_rows(tiny_settings):
    """B R A is the best rank r of -eta sign(G), G by autograd on the base's own weights, over the rows that were asked about."""

    config = Config.from_dict({**tiny_settings, "adapter": {**SB, "first_step": 0.01}, "strategy": {"name": "fed_sb"}})
    parts = assemble(config)
    survey, layout = parts.worker.surveys["adapter"], parts.adapted.layout()
    total = {}
    weights = {pair.module: dict(parts.adapted.model.named_modules())[pair.module].base_layer.weight for pair in layout.pairs}
    wanted = dict.fromkeys(weights, 0.0)
    for node in parts.worker.nodes.values():
        for name, array in survey.measure(parts.adapted, parts.task, node.train, config.training).items():
            total[name] = total.get(name, 0) + array.astype(np.float64)
        used = min(len(node.train) // 4, 8) * 4
        inputs, labels = node.train.batch(np.arange(used), parts.adapted.base.tokenizer, "cpu")
        parts.adapted.model.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        parts.task.losses(parts.adapted.model, inputs, labels).sum().backward()
        for module, weight in weights.items():
            wanted[module] = wanted[module] + weight.grad.numpy()
            weight.grad = None
            weight.requires_grad_(False)
    found = survey.finish(total, layout)
    for pair in layout.pairs:
        np.testing.assert_allclose(total[pair.module], wanted[pair.module], atol=1e-5)
        U, S, Vt = np.linalg.svd(-0.01 * np.sign(wanted[pair.module]), full_matrices=False)
        np.testing.assert_allclose(found[pair.B] @ found[pair.core] @ found[pair.A], (U[:, :4] * S[:4]) @ Vt[:4], atol=1e-5)


# --- SCAFFOLD --------------------------------------------------------------------------------------------------------


SGD = {"optimizer": "sgd", "max_grad_norm": None, "learning_rate": 0.1}


def test_the_control_variate_is_the_mean_of_the_clients_own_gradients(tiny_settings):
    """Option II with plain SGD, from a drift that is not zero, with a falling learning rate: weighted by step size."""
    training = {**tiny_settings["training"], **SGD, "lr_scheduler_type": "linear"}
    strategy = Scaffold()
    ends = {}
    for steps in (1, 2):
        config = Config.from_dict(
            {**tiny_settings, "training": {**training, "max_steps": steps}, "strategy": {"name": "scaffold", "num_rounds": 1}}
        )
        parts = assemble(config)
        at = Round(1, 1, parts.adapted.layout())
        names = parts.adapted.trained
        generator = np.random.default_rng(0)
        received = {
            **parts.adapted.read(),
            **{CONTROL + n: 0.01 * generator.normal(size=parts.adapted.read()[n].shape).astype("f4") for n in names},
        }
        memory = {CONTROL + n: 0.01 * generator.normal(size=received[n].shape).astype("f4") for n in names}
        from fedpeft.training.job import rates, step_sizes

        here = turn(at, received, memory, step_sizes(config, len(parts.worker.nodes[0].train), 1))
        job = Job(0, 1, strategy.begin(here), names, parts.worker.nodes[0].train, drift=strategy.drift(here))
        (trained,) = one.train(parts.adapted, parts.task, config, [job])
        ends[steps] = (strategy.end(here, job.start, trained.arrays), trained.arrays, rates(config, len(job.data), 1))
        if steps == 1:
            for name in names:
                drift = received[CONTROL + name] - memory[CONTROL + name]
                gradient = (received[name] - trained.arrays[name]) / ends[1][2][0] - drift
                renewed = ends[1][0][1][CONTROL + name]
                np.testing.assert_allclose(renewed, gradient, atol=1e-5)
                np.testing.assert_allclose(ends[1][0][0][CONTROL + name], renewed - memory[CONTROL + name], atol=1e-7)
    (_, remembered), after, (first, second) = ends[2]
    for name in names:
        drift = received[CONTROL + name] - memory[CONTROL + name]
        whole_way = received[name] - after[name]
        np.testing.assert_allclose((first + second) * (remembered[CONTROL + name] + drift), whole_way, atol=1e-6)


def test_the_servers_control_variate_moves_by_the_mean_over_all_clients():
    case = draw_case(12, clients=2)
    strategy = Scaffold()
    received = {**case.received, **strategy.extras(case.received)}
    updates = [
        Update(1, k, {**tensors, **{CONTROL + name: array for name, array in tensors.items()}}, n)
        for k, (tensors, n) in enumerate(zip(case.full, case.counts, strict=True))
    ]
    at = dataclasses.replace(case.at, clients=10)
    combined = strategy.combine(updates, received, at)
    plain, _ = case.step(FedAvg())
    for name in case.received:
        np.testing.assert_allclose(combined.arrays[name], plain[name], atol=1e-12)
        np.testing.assert_allclose(combined.arrays[CONTROL + name], sum(tensors[name] for tensors in case.full) / 10, atol=1e-12)


@pytest.mark.parametrize("over", ["fedavg", "ffa_lora", "ro_lora"])
def test_scaffold_in_a_run_costs_twice_the_bytes_and_remembers(over, tiny_settings, tmp_path):
    training = {**tiny_settings["training"], "optimizer": "sgd", "learning_rate": 0.05}
    found = {}
    for name, own in (("scaffold", {"over": over}), (over, {})):
        given = {**tiny_settings, "training": training, "strategy": {"name": name, "num_rounds": 3, "fraction_train": 0.75, **own}}
        run = simulate(Config.from_dict(given), tmp_path / name)
        assert run.summary["rejected_updates"] == 0
        found[name] = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()], run
    for line, plain in zip(found["scaffold"][0][1:], found[over][0][1:], strict=True):
        assert 1.7 * plain["bytes_up"] < line["bytes_up"] < 2.3 * plain["bytes_up"]
    arrays = found["scaffold"][1].arrays
    assert any(array.any() for name, array in arrays.items() if name.startswith(BESIDE))
    assert found["scaffold"][0][1]["loss"] == found[over][0][1]["loss"], "nothing to correct in the first round"
    assert found["scaffold"][0][3]["loss"] != found[over][0][3]["loss"]


@pytest.mark.parametrize(
    ("strategy", "optimizer", "says"),
    [
        ({"name": "scaffold"}, "adamw", "no sum of gradients"),
        ({"name": "scaffold", "over": "fed_svd"}, "sgd", "turns the basis"),
        ({"name": "scaffold", "over": "fedsa_lora"}, "sgd", "the same tensors on all clients"),
    ],
)
def test_a_scaffold_that_means_nothing_is_refused(strategy, optimizer, says):
    with pytest.raises(UserError, match=says):
        Config.from_dict({"strategy": strategy, "training": {"optimizer": optimizer}})


def test_every_hook_of_a_strategy_reaches_the_one_underneath():
    """What `Over` forgets to hand on would silently be the default."""
    from fedpeft.strategies.over import Over
    from fedpeft.strategies.strategy import Strategy

    kept = {"apply"}  # the server's step is what a wrapper may change; none underneath has one
    hooks = {
        name for name, value in vars(Strategy).items() if not name.startswith("_") and (callable(value) or isinstance(value, property))
    }
    assert hooks - kept <= set(vars(Over))


# --- planted errors --------------------------------------------------------------------------------------------------


class ForgetsTheClientsThatSatOut(Scaffold):
    def combine(self, updates, received, at):
        return super().combine(updates, received, dataclasses.replace(at, clients=len(updates)))


class TransposedSketch(FedAsk):
    def answer(self, turn, asked):
        return {name: array[::-1].copy() for name, array in super().answer(turn, asked).items()}


class KeepsTheSparseValues(Slora):
    def combine(self, updates, received, at):
        combined = super().combine(updates, received, at)
        mean = FedAvg().combine(updates, received, at).arrays
        return dataclasses.replace(combined, arrays={n: mean[n] if n.startswith("sparse.") else a for n, a in combined.arrays.items()})


def test_planted_errors_are_caught(monkeypatch):
    import sys

    here = sys.modules[__name__]
    for original, mutant, test in (
        ("Scaffold", ForgetsTheClientsThatSatOut, test_the_servers_control_variate_moves_by_the_mean_over_all_clients),
        ("FedAsk", TransposedSketch, test_a_client_that_is_gone_after_the_first_hop_leaves_a_right_mean_of_the_others),
        ("Slora", KeepsTheSparseValues, lambda: test_at_the_switch_lora_starts_from_the_best_rank_of_the_mean_sparse_update(False)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(here, original, mutant)
            with pytest.raises(AssertionError):
                test()


@pytest.mark.parametrize(("factor", "reason"), [("nan", "not finite"), ("1e9", "over norm")])
@pytest.mark.parametrize(("strategy", "training"), [({"name": "scaffold"}, {"optimizer": "sgd"}), ({"name": "fedsa_lora"}, {})])
def test_one_turn_that_nobody_believes_is_not_remembered(strategy, training, factor, reason, tiny_settings, tmp_path, monkeypatch):
    """Else the client would begin from it for ever."""
    real = one._train_client

    def once(adapted, task, config, job):
        trained = real(adapted, task, config, job)
        spoiled = {name: (array + 1) * np.float32(factor) for name, array in trained.arrays.items()}
        return dataclasses.replace(trained, arrays=spoiled) if (job.client, job.round) == (0, 1) else trained

    monkeypatch.setattr(one, "_train_client", once)
    settings = {**tiny_settings, "strategy": {**strategy, "num_rounds": 3}, "training": {**tiny_settings["training"], **training}}
    run = simulate(Config.from_dict(settings), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["accepted"] for line in lines[1:]] == [3, 4, 4]
    assert lines[1]["rejected"] == {reason: 1}
    assert run.summary["metrics"]["loss"] < 2 * lines[0]["metrics"]["loss"]


def test_a_client_whose_shared_part_cannot_move_yet_is_accepted(tiny_settings, tmp_path):
    """FedSA-LoRA's A gets no gradient while B is zero: after one step of a client it is as it was sent."""
    settings = {**tiny_settings, "strategy": {"name": "fedsa_lora", "num_rounds": 2}}
    simulate(Config.from_dict({**settings, "training": {**settings["training"], "max_steps": 1}}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["accepted"] for line in lines[1:]] == [4, 4]
