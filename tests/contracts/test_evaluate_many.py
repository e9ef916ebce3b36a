"""Many models evaluated in one pass have the metrics that each has alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedpeft import Config, simulate
from fedpeft.training import evaluate, evaluate_many, seating

from .engines import ADAPTERS, build_with, jobs_with_rules, settings_with

CLOSE = 1e-5


class Logits:
    """A task whose metrics are all logits."""

    def outputs(self, model, inputs, labels):
        return model(**inputs).logits

    def measure(self, logits, labels):
        return {"logits": logits, "labels": labels}


def models_of(parts, ranks=None):
    found = []
    for job in jobs_with_rules(parts):
        start = dict(job.start)
        for pair in parts.adapted.layout().pairs if ranks else ():
            r = ranks[job.client % len(ranks)]
            start |= {pair.A: start[pair.A][:r], pair.B: start[pair.B][:, :r]}
        found.append((start, job.data))
    return found


def farthest(left, right):
    assert [list(a["labels"]) for a in left] == [list(b["labels"]) for b in right]
    return max(float(np.abs(a["logits"] - b["logits"]).max()) for a, b in zip(left, right, strict=True))


def both(config, parts, models, caplog):
    evaluate_many._say.cache_clear()
    left, right = (each(parts.adapted, Logits(), models, config.training) for each in (evaluate.each, evaluate_many.each))
    assert not [record for record in caplog.records if record.name == evaluate_many.__name__]
    return left, right


@pytest.mark.parametrize("clients", [1, 3, 32])
@pytest.mark.parametrize("adapter", ["lora", "fora half", "miss", "lora_sb"])
def test_logits_are_those_of_each_alone(adapter, clients, tiny_settings, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS[adapter], clients=clients, per_device_eval_batch_size=5)
    models = models_of(parts)
    left, right = both(config, parts, models, caplog)
    assert farthest(left, right) < CLOSE
    if clients > 1:
        assert (
            farthest([*left[1:]], evaluate.each(parts.adapted, Logits(), [(models[0][0], data) for _, data in models[1:]], config.training))
            > 1e-2
        )


def test_models_of_different_ranks(tiny_settings, caplog):
    config, parts = build_with(tiny_settings, {**ADAPTERS["lora"], "r": 8})
    assert farthest(*both(config, parts, models_of(parts, ranks=[1, 8, 3, 5]), caplog)) < CLOSE


def test_one_model_on_many_data_sets_is_held_once(tiny_settings, caplog, monkeypatch):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], clients=8)
    models = [(dict(models_of(parts)[0][0]), data) for _, data in models_of(parts)]
    assert farthest(*both(config, parts, models, caplog)) < CLOSE
    cohort = seating.seat(parts.adapted, [arrays for arrays, _ in models])
    assert all(own.same for own in cohort.tensors.values())


def test_few_at_once(tiny_settings, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], clients=8, clients_at_once=3)
    assert farthest(*both(config, parts, models_of(parts), caplog)) < CLOSE


def test_what_cannot_be_stacked_is_evaluated_one_by_one(tiny_settings, caplog):
    evaluate_many._say.cache_clear()
    config, parts = build_with(tiny_settings, {"name": "dora", "r": 4, "target_modules": ["query"]})
    models = [(parts.adapted.read(), node.train) for node in parts.worker.nodes.values()]
    left, right = (each(parts.adapted, Logits(), models, config.training) for each in (evaluate.each, evaluate_many.each))
    assert farthest(left, right) == 0.0
    assert "one client at a time" in caplog.text


def test_a_neighbours_adapter_is_seen(tiny_settings, monkeypatch):
    """A planted error."""
    config, parts = build_with(tiny_settings, ADAPTERS["lora"])
    models = models_of(parts)
    left = evaluate.each(parts.adapted, Logits(), models, config.training)
    sit = seating.Cohort.sit
    monkeypatch.setattr(seating.Cohort, "sit", lambda self, seats, *rest: sit(self, [max(0, seat - 1) for seat in seats], *rest))
    assert farthest(left, evaluate_many.each(parts.adapted, Logits(), models, config.training)) > 1e-2


@pytest.mark.parametrize("strategy", ["fedsa_lora", "fedavg"])
def test_whole_runs_report_the_same_validation(strategy, tiny_settings, tmp_path):
    lines = {}
    for engine in ("one", "many"):
        settings = settings_with(tiny_settings, engine=engine, max_steps=2)
        settings |= {"strategy": {"name": strategy, "num_rounds": 2}, "data": {**settings["data"], "validation_fraction": 0.3}}
        simulate(Config.from_dict(settings), tmp_path / engine)
        lines[engine] = [json.loads(line) for line in (tmp_path / engine / "rounds.jsonl").read_text().splitlines()]
    for left, right in zip(lines["one"], lines["many"], strict=True):
        for line in (left, right):
            line["report"].pop("clients_seconds", None)
        assert left["report"] == pytest.approx(right["report"], abs=1e-4)
    assert any("validation" in key for key in lines["many"][-1]["report"] | lines["many"][-1]["metrics"])
