"""Rows of a step are dealt to its batches by length: less padding, the same examples in every step, the same training."""

import dataclasses

import numpy as np
import pytest
import torch

from fedpeft import Config
from fedpeft.simulations.assemble import assemble
from fedpeft.training import many, one
from fedpeft.training.job import Job, batches

BUCKETS = [{"length_buckets": 1}, {"length_buckets": 2}, {"length_buckets": 3, "gradient_accumulation_steps": 2}]


def built(settings, dropout=False, **training):
    whole = {"per_device_train_batch_size": 6, "max_steps": 3, "optimizer": "sgd", "learning_rate": 0.1, **training}
    model = {**settings["model"], "dropout": dropout}
    config = Config.from_dict({**settings, "model": model, "training": {**settings["training"], **whole}})
    parts = assemble(config)
    jobs = [Job(c, 1, parts.adapted.read(), parts.adapted.trained, node.train) for c, node in parts.worker.nodes.items()]
    for job in jobs:  # texts of unlike lengths
        for number, row in enumerate(job.data.inputs):
            row |= {name: array[: 3 + number % 9] for name, array in row.items()}
    return config, parts, jobs


def padding(jobs, config):
    """Tokens that hold nothing, in all batches of a round."""
    lost = 0
    for job in jobs:
        for batch in (batch for step in batches(config, job) for batch in step):
            lengths = [len(job.data.inputs[row]["input_ids"]) for row in batch]
            lost += max(lengths) * len(lengths) - sum(lengths)
    return lost


@pytest.mark.parametrize("training", BUCKETS[1:])
def test_a_step_holds_the_same_examples_with_less_padding(training, tiny_settings):
    config, _, jobs = built(tiny_settings, **training)
    without = config.model_copy(update={"training": config.training.model_copy(update={"length_buckets": 1})})
    for job in jobs:
        plain, dealt = batches(without, job), batches(config, job)
        assert [sorted(np.concatenate(step)) for step in plain] == [sorted(np.concatenate(step)) for step in dealt]
        assert all(len(batch) for step in dealt for batch in step)
        assert [len(step) for step in dealt] == [min(training["length_buckets"] * len(step), sum(map(len, step))) for step in plain]
    assert padding(jobs, config) < 0.6 * padding(jobs, without)


@pytest.mark.parametrize("engine", [one, many], ids=["one", "many"])
@pytest.mark.parametrize("training", BUCKETS[1:])
def test_training_is_the_same(training, engine, tiny_settings):
    config, parts, jobs = built(tiny_settings, **training)
    without = config.model_copy(update={"training": config.training.model_copy(update={"length_buckets": 1})})
    left, right = (engine.train(parts.adapted, parts.task, each, jobs) for each in (without, config))
    for mine, theirs, job in zip(left, right, jobs, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert max(np.abs(mine.arrays[name] - job.start[name]).max() for name in job.names) > 1e-3
        for name in job.names:
            np.testing.assert_allclose(mine.arrays[name], theirs.arrays[name], atol=1e-5)


@pytest.mark.parametrize("training", BUCKETS)
def test_the_engines_agree_with_dropout(training, tiny_settings):
    config, parts, jobs = built(tiny_settings, dropout=True, **training)
    left, right = (engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many))
    for mine, theirs in zip(left, right, strict=True):
        for name in mine.arrays:
            np.testing.assert_allclose(mine.arrays[name], theirs.arrays[name], atol=1e-5)


def test_a_batch_dealt_wrongly_is_seen(tiny_settings, monkeypatch):
    """A planted error: the rows of a short step counted twice."""
    config, parts, jobs = built(tiny_settings, length_buckets=2)
    expected = one.train(parts.adapted, parts.task, config, jobs[:1])
    monkeypatch.setattr(one, "batches", lambda config, job: [[*step, step[0]] for step in batches(config, job)])
    off = one.train(parts.adapted, parts.task, config, [dataclasses.replace(jobs[0])])
    assert max(np.abs(off[0].arrays[name] - expected[0].arrays[name]).max() for name in off[0].arrays) > 1e-4
    assert torch.is_grad_enabled()
