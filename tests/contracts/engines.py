"""What the tests of the engines share."""

from __future__ import annotations

import numpy as np
import torch

from fedpeft import Config
from fedpeft.adapters.fora import GATE
from fedpeft.simulations.assemble import assemble
from fedpeft.training import many
from fedpeft.training.job import Job

CLOSE = 1e-5

TARGETS = {"target_modules": ["query", "value"]}
ADAPTERS = {
    "lora": {"name": "lora", "r": 4, "lora_dropout": 0.1, **TARGETS},
    "lora_fa": {"name": "lora_fa", "r": 4, "lora_dropout": 0.1, **TARGETS},
    "fora": {"name": "fora", "r": 4, "lora_dropout": 0.1, "layers": 1.0, **TARGETS},
    "fora half": {"name": "fora", "r": 4, **TARGETS},
    "fora not orthonormal": {"name": "fora", "r": 4, "layers": 1.0, "orthonormal": False, **TARGETS},
    "miss": {"name": "miss", "r": 4, "miss_dropout": 0.1, **TARGETS},
    "miss with a remainder": {"name": "miss", "r": 5, **TARGETS},
    "mini miss": {"name": "miss", "r": 4, "mini_r": 8, "init_weights": "mini", **TARGETS},
    "lora_sb": {"name": "lora_sb", "r": 6, "lora_dropout": 0.1, "start": "orthonormal", **TARGETS},
}


def settings_with(settings, adapter=None, clients=4, **training):
    """A run with these training settings, and steps and rates that tell errors."""
    whole = {"lr_scheduler_type": "linear", "learning_rate": 2e-3, "max_steps": 4, "weight_decay": 0.1, **training}
    return {
        **settings,
        "partition": {"name": "dirichlet", "clients": clients, "alpha": 1.0, "min_examples": 1},
        "adapter": {**settings["adapter"], **(adapter or {})},
        "training": {**settings["training"], **whole},
    }


def no_dropout(parts):
    """Switch the base's dropouts off."""
    for module in parts.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def farthest(left, right):
    """The largest difference of any number of any client."""
    assert [type(trained) for trained in left] == [type(trained) for trained in right]
    assert all(a.steps == b.steps and list(a.arrays) == list(b.arrays) for a, b in zip(left, right, strict=True))
    assert all(a.arrays[name].shape == b.arrays[name].shape for a, b in zip(left, right, strict=True) for name in a.arrays)
    losses = [abs(a.loss - b.loss) for a, b in zip(left, right, strict=True) if a.loss is not None or b.loss is not None]
    return max([float(np.abs(a.arrays[n] - b.arrays[n]).max()) for a, b in zip(left, right, strict=True) for n in a.arrays] + losses)


def moved(jobs, ended):
    """How far the tensor went that went least."""
    return min(float(np.abs(end.arrays[name] - job.start[name]).max()) for job, end in zip(jobs, ended, strict=True) for name in end.arrays)


def said(caplog):
    """What engine `many` wrote to its log."""
    return [record.getMessage() for record in caplog.records if record.name == many.__name__]


def build_with(settings, adapter, clients=4, **training):
    """A config with this adapter, and its parts."""
    config = Config.from_dict({**settings_with(settings, clients=clients, **training), "adapter": adapter})
    return config, assemble(config)


def jobs_with_rules(parts, round=2):
    """A job a client, from starts of their own, with the rules of the adapter; what must be orthonormal is."""
    layout, adapter = parts.adapted.layout(), parts.adapted.adapter
    drawn = parts.adapted.read()
    if getattr(adapter, "layers", 1.0) < 1.0:
        drawn["beside.fora_layers"] = np.array([[1.0, 2.0], [0.0, 1.0]], np.float32)
    resting = adapter.resting(layout, drawn)
    found = []
    for client, node in parts.worker.nodes.items():
        generator = np.random.default_rng(client)
        start = dict(drawn)
        names = tuple(name for name in parts.adapted.trained if name not in resting)
        for name in names:
            start[name] = (drawn[name] + 0.05 * generator.standard_normal(drawn[name].shape)).astype(np.float32)
            start[name] += 0.5 if name.endswith(GATE) else 0.0
        rules = adapter.rules(layout, start)
        start |= {name: np.linalg.qr(start[name])[0].astype(np.float32) for name in rules.orthonormal & set(names)}
        found.append(Job(client, round, start, names, node.train, rules=rules))
    return found
