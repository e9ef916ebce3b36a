"""States kept of frozen layers change nothing but rounding, and are used exactly where they may be."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from fedpeft import Config, simulate
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate, many, one, prefix
from fedpeft.training.job import Job
from fedpeft.training.prefix import Prefix

from .engines import ADAPTERS, CLOSE, farthest, jobs_with_rules, settings_with

TOP = {"name": "lora", "r": 4, "target_modules": r".*layer\.1\.attention\.self\.(query|value)"}
CACHE = {"prefix_cache": "memory", "max_steps": 6}


def build(settings, adapter=None, dropout=False, **training):
    whole = settings_with(settings, **{**CACHE, **training})
    config = Config.from_dict({**whole, "adapter": adapter or TOP, "model": {**settings["model"], "dropout": dropout}})
    return config, assemble(config)


def layers(parts):
    return parts.adapted.base.model.bert.encoder.layer


@pytest.fixture
def calls(monkeypatch):
    """How many rows each layer of a model has worked on."""

    def count(parts):
        seen = dict.fromkeys(range(len(layers(parts))), 0)
        for number, layer in enumerate(layers(parts)):
            inner = layer.attention  # what a layer that is skipped does not call
            inner.register_forward_hook(
                lambda module, given, output, number=number: seen.__setitem__(number, seen[number] + len(output[0]))
            )
        return seen

    return count


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("engine", [one, many], ids=["one", "many"])
def test_training_and_evaluation_are_those_without(engine, kind, tiny_settings, calls):
    config, parts = build(tiny_settings, prefix_cache=kind)
    jobs, seen = jobs_with_rules(parts), None
    parts.adapted.prefix, kept = Prefix(parts.adapted), parts.adapted.prefix
    without = engine.train(parts.adapted, parts.task, config, jobs)
    parts.adapted.write({**parts.adapted.read(), **without[0].arrays})
    plain = evaluate.logits(parts.adapted, parts.test, 7)
    parts.adapted.prefix, seen = kept, calls(parts)
    ended = engine.train(parts.adapted, parts.task, config, jobs)
    assert farthest(without, ended) < CLOSE
    examples = sum(len(node.train) for node in parts.worker.nodes.values())
    assert 0 < seen[0] <= examples + 6, "each example once, and a few to see that it can be done"
    assert seen[1] >= 4 * 6 * 1
    parts.adapted.write({**parts.adapted.read(), **without[0].arrays})
    np.testing.assert_allclose(evaluate.logits(parts.adapted, parts.test, 7), plain, atol=CLOSE)
    before = seen[0]
    evaluate.logits(parts.adapted, parts.test, 5)
    assert seen[0] == before, "all of it was kept"
    parts.adapted.prefix._release()
    assert not any("forward" in vars(layer) for layer in layers(parts))


def test_what_does_not_fit_is_computed_each_time(tiny_settings):
    config, parts = build(tiny_settings, prefix_cache_gb=1e-5)  # ten kilobytes: a handful of examples
    jobs = jobs_with_rules(parts)
    ended = many.train(parts.adapted, parts.task, config, jobs)
    kept = parts.adapted.prefix._store._kept
    assert 0 < len(kept) < 20
    assert sum(states.nbytes for states in kept.values()) <= 1e4
    parts.adapted.prefix = Prefix(parts.adapted)
    assert farthest(one.train(parts.adapted, parts.task, config, jobs), ended) < CLOSE


@pytest.mark.parametrize("engine", [one, many], ids=["one", "many"])
def test_a_base_that_drops_out_is_cached_in_evaluation_alone(engine, tiny_settings, caplog, calls):
    config, parts = build(tiny_settings, dropout=True)
    jobs = jobs_with_rules(parts)
    parts.adapted.prefix, kept = Prefix(parts.adapted), parts.adapted.prefix
    without = engine.train(parts.adapted, parts.task, config, jobs)
    parts.adapted.prefix = kept
    assert farthest(without, engine.train(parts.adapted, parts.task, config, jobs)) < CLOSE
    assert [record.getMessage() for record in caplog.records if record.name == prefix.__name__] == [
        "prefix cache: used in evaluation only: the base drops out below layer 1 (model.dropout=false ends that)"
    ]
    evaluate.logits(parts.adapted, parts.test, 7)
    seen = calls(parts)
    evaluate.logits(parts.adapted, parts.test, 7)
    assert seen == {0: 0, 1: len(parts.test)}


def test_states_that_training_moves_are_not_kept(tiny_settings, caplog):
    """A norm over the batch below layer l: its running means go on while the adapter trains."""
    import torch

    class Norm(torch.nn.BatchNorm1d):
        def forward(self, states):
            return super().forward(states.transpose(1, 2)).transpose(1, 2)

    config, parts = build(tiny_settings)
    layers(parts)[0].output.dropout = Norm(parts.adapted.base.model.config.hidden_size).requires_grad_(False)
    one.train(parts.adapted, parts.task, config, jobs_with_rules(parts))
    assert parts.adapted.prefix._store is None
    assert "prefix cache: not used" in caplog.text and "normalises over the rows" in caplog.text


def test_adapters_in_the_first_layer_leave_nothing_to_keep(tiny_settings):
    config, parts = build(tiny_settings, ADAPTERS["lora"])
    many.train(parts.adapted, parts.task, config, jobs_with_rules(parts))
    assert parts.adapted.prefix._store is None


def test_an_adapted_pooler_comes_behind_what_is_kept(tiny_settings):
    config, parts = build(tiny_settings, {**TOP, "target_modules": r".*(layer\.1\.attention\.self\.(query|value)|pooler\.dense)"})
    jobs = jobs_with_rules(parts)
    assert any("pooler" in name for name in jobs[0].names)
    ended = many.train(parts.adapted, parts.task, config, jobs)
    assert parts.adapted.prefix._store is not None
    parts.adapted.prefix = Prefix(parts.adapted)
    assert farthest(one.train(parts.adapted, parts.task, config, jobs), ended) < CLOSE


def test_states_of_another_example_are_seen(tiny_settings, monkeypatch):
    """A planted error: the key forgets the tokens, not the length."""
    config, parts = build(tiny_settings)
    jobs = jobs_with_rules(parts)
    expected = one.train(parts.adapted, parts.task, config, jobs)
    monkeypatch.setattr(prefix, "_key", lambda inputs: bytes(inputs["input_ids"].shape))
    parts.adapted.prefix = Prefix(parts.adapted, parts.task.outputs, "memory", 1.0)
    assert farthest(expected, many.train(parts.adapted, parts.task, config, jobs)) > 10 * CLOSE


def test_a_model_that_looks_below_is_not_cut(tiny_settings, caplog):
    """Its head reads what the first layer gives too."""
    config, parts = build(tiny_settings)
    bert, seen = parts.adapted.base.model.bert, []
    layers(parts)[0].register_forward_hook(lambda layer, given, output: seen.append(output))
    bert.pooler.register_forward_pre_hook(lambda pooler, given: (given[0] + seen[-1],))
    jobs = jobs_with_rules(parts)
    with caplog.at_level(logging.WARNING):
        ended = one.train(parts.adapted, parts.task, config, jobs)
    assert "the model reads its lower layers elsewhere too" in caplog.text
    parts.adapted.prefix = Prefix(parts.adapted)
    assert farthest(one.train(parts.adapted, parts.task, config, jobs), ended) == 0.0


@pytest.mark.parametrize("engine", ["one", "many"])
def test_whole_runs_agree_where_the_lowest_layer_is_chosen_on_the_way(engine, tiny_settings, tmp_path):
    """FoRA: no layer is chosen when the first evaluation is made."""
    ended = {}
    for kind in ("none", "memory"):
        settings = settings_with(tiny_settings, engine=engine, prefix_cache=kind, max_steps=2)
        settings |= {"adapter": ADAPTERS["fora half"], "model": {**settings["model"], "dropout": False}, "strategy": {"num_rounds": 2}}
        ended[kind] = simulate(Config.from_dict(settings), tmp_path / kind)
    for name, array in ended["none"].arrays.items():
        np.testing.assert_allclose(array, ended["memory"].arrays[name], atol=CLOSE, err_msg=name)
    lines = [(tmp_path / kind / "rounds.jsonl").read_text().splitlines() for kind in ended]
    assert [json.loads(line)["metrics"] for line in lines[0]] == [pytest.approx(json.loads(line)["metrics"], abs=1e-4) for line in lines[1]]


@pytest.mark.parametrize("engine", [one, many], ids=["one", "many"])
@pytest.mark.parametrize("packing", [False, True], ids=["records", "packed rows"])
def test_language_models_are_cut_as_their_task_asks_them(packing, engine, tiny_lm_settings):
    """Packed rows have a mask and positions that the task makes."""
    settings = {
        **tiny_lm_settings,
        "model": {**tiny_lm_settings["model"], "packing": packing, "dropout": False},
        "data": {**tiny_lm_settings["data"], "max_length": 40 if packing else 24},
        "adapter": {"name": "lora", "r": 4, "target_modules": r".*layers\.1\..*(q_proj|v_proj|down_proj)"},
        "training": {**tiny_lm_settings["training"], "optimizer": "sgd", "learning_rate": 0.1, **CACHE},
    }
    parts = assemble(config := Config.from_dict(settings))
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    ended = engine.train(parts.adapted, parts.task, config, jobs)
    cut = evaluate.evaluate(parts.adapted, parts.task, jobs[0].start, parts.test, 7)
    assert parts.adapted.prefix._store._kept
    parts.adapted.prefix = Prefix(parts.adapted)
    assert farthest(engine.train(parts.adapted, parts.task, config, jobs), ended) < CLOSE
    assert evaluate.evaluate(parts.adapted, parts.task, jobs[0].start, parts.test, 7) == pytest.approx(cut, rel=1e-5)
