"""Engine `many` against the reference: client by client the same numbers, whoever shares a pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedpeft import Config, simulate
from fedpeft.data.encoded import Encoded
from fedpeft.records import Failure, merge_names
from fedpeft.simulations.assemble import assemble
from fedpeft.training import many, one
from fedpeft.training.job import Job

CLOSE = 1e-5


@pytest.fixture(autouse=True)
def _said_again():
    """What is said once a process is said once a test."""
    many._fell_back.cache_clear()
    many._ran_out.cache_clear()


def settings_with(settings, adapter=None, clients=4, **training):
    whole = {"lr_scheduler_type": "linear", "learning_rate": 2e-3, "max_steps": 4, "weight_decay": 0.1, **training}
    return {
        **settings,
        "partition": {"name": "dirichlet", "clients": clients, "alpha": 1.0, "min_examples": 1},
        "adapter": {**settings["adapter"], **(adapter or {})},
        "training": {**settings["training"], **whole},
    }


def build(settings, adapter=None, clients=4, **training):
    config = Config.from_dict(settings_with(settings, adapter, clients, **training))
    return config, assemble(config)


def no_dropout(parts):
    for module in parts.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def jobs_of(parts, trains=lambda name: True, ranks=None, round=2):
    """A job a client: factors of its own in which neither A nor B is zero, and a head of its own."""
    pairs = {name: pair for pair in parts.adapted.layout().pairs for name in (pair.A, pair.B)}
    drawn = parts.adapted.read()
    jobs = []
    for client, node in parts.worker.nodes.items():
        generator = np.random.default_rng(client)
        start = {name: (array + 0.05 * generator.standard_normal(array.shape)).astype(np.float32) for name, array in drawn.items()}
        if ranks:
            r = ranks[client % len(ranks)]
            start |= {name: array[:r] if name == pairs[name].A else array[:, :r] for name, array in start.items() if name in pairs}
        names = tuple(name for name in parts.adapted.trained if trains(name))
        jobs.append(Job(client, round, start, names, node.train))
    return jobs


def farthest(left, right):
    """The largest difference of any number of any client."""
    assert [type(trained) for trained in left] == [type(trained) for trained in right]
    assert all(a.steps == b.steps and list(a.arrays) == list(b.arrays) for a, b in zip(left, right, strict=True))
    assert all(a.arrays[name].shape == b.arrays[name].shape for a, b in zip(left, right, strict=True) for name in a.arrays)
    losses = [abs(a.loss - b.loss) for a, b in zip(left, right, strict=True)]
    return max([float(np.abs(a.arrays[n] - b.arrays[n]).max()) for a, b in zip(left, right, strict=True) for n in a.arrays] + losses)


def moved(jobs, ended):
    return min(float(np.abs(end.arrays[name] - job.start[name]).max()) for job, end in zip(jobs, ended, strict=True) for name in end.arrays)


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == many.__name__]


def both(config, parts, jobs, caplog):
    left = one.train(parts.adapted, parts.task, config, jobs)
    right = many.train(parts.adapted, parts.task, config, jobs)
    assert not said(caplog), "fell back: there is nothing to compare"
    return left, right


CASES = {
    "plain": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "rslora": {"adapter": {"use_rslora": True}},
    "lora dropout": {"adapter": {"lora_dropout": 0.3}},
    "one client": {"clients": 1},
    "three clients": {"clients": 3},
    "unclipped": {"max_grad_norm": None},
    "clipped hard": {"max_grad_norm": 1e-2, "optimizer": "sgd", "learning_rate": 0.5},
    "warm-up and cosine": {"warmup_ratio": 0.5, "lr_scheduler_type": "cosine"},
    "epochs": {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 3},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "epochs and accumulation": {
        "max_steps": None,
        "num_train_epochs": 1.5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "few at once": {"clients_at_once": 2, "clients": 5},
}


@pytest.mark.parametrize("dropout", ["no dropout", "dropout"])
@pytest.mark.parametrize("case", CASES)
def test_many_is_one_client_by_client(case, dropout, tiny_settings, caplog):
    config, parts = build(tiny_settings, **CASES[case])
    if dropout == "no dropout":
        no_dropout(parts)
    jobs = jobs_of(parts)
    left, right = both(config, parts, jobs, caplog)
    assert moved(jobs, left) > 0
    assert farthest(left, right) < CLOSE


def test_32_clients_in_short_passes(tiny_settings, caplog, monkeypatch):
    monkeypatch.setattr("fedpeft.training.memory.ON_CPU", 40)
    config, parts = build(tiny_settings, clients=32, adapter={"lora_dropout": 0.1}, max_steps=2)
    assert farthest(*both(config, parts, jobs_of(parts), caplog)) < CLOSE


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "classifier"])
def test_frozen_tensors(frozen, tiny_settings, caplog):
    config, parts = build(tiny_settings)
    jobs = jobs_of(parts, trains=lambda name: frozen not in name)
    left, right = both(config, parts, jobs, caplog)
    assert not any(frozen in name for name in right[0].arrays)
    assert farthest(left, right) < CLOSE


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_of_their_own(use_rslora, tiny_settings, caplog):
    config, parts = build(tiny_settings, adapter={"use_rslora": use_rslora, "r": [1, 4, 8]})
    jobs = jobs_of(parts, ranks=[1, 4, 8, 2])
    assert farthest(*both(config, parts, jobs, caplog)) < CLOSE
