"""Evaluation of many adapters over one base: every row of a pass meets its own client's adapter and head.

Clients whose models differ (personal strategies, ranks of their own) go through the base together, as they do in training;
what is the same everywhere is held once.

Paper: the setting is that of Sheng et al. 2023 (arXiv:2311.03285), who serve thousands of adapters over one base.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.records import BESIDE, Arrays, Metrics
from fedpeft.sections import TrainingSection
from fedpeft.training import evaluate, memory
from fedpeft.training.masks import UnsuitedError
from fedpeft.training.passes import Batch, Plan, by_length, cut, length
from fedpeft.training.seating import seat
from fedpeft.training.stacked_layers import obstacle, stacked

log = logging.getLogger(__name__)

Model = tuple[Arrays, Encoded]  # a client's arrays, and what they are evaluated on


def each(adapted: Adapted, task: Any, models: Sequence[Model], training: TrainingSection) -> list[Metrics]:
    """The task's metrics of every model on its own data, in the order given: those that `evaluate.each` gives, but for rounding."""
    reason = obstacle(adapted)
    if reason is None:
        try:
            return _in_cohorts(adapted, task, models, training)
        except UnsuitedError as error:
            reason = str(error)
    _say(reason)
    return evaluate.each(adapted, task, models, training)


@functools.cache
def _say(reason: str) -> None:
    log.warning("evaluation: one client at a time, since %s", reason)


def _in_cohorts(adapted: Adapted, task: Any, models: Sequence[Model], training: TrainingSection) -> list[Metrics]:
    numbers = max((sum(array.size for name, array in arrays.items() if not name.startswith(BESIDE)) for arrays, _ in models), default=1)
    size = memory.clients_at_once(training, adapted.base.device, numbers)
    return [
        metrics for start in range(0, len(models), size) for metrics in _together(adapted, task, models[start : start + size], training)
    ]


def _together(adapted: Adapted, task: Any, models: Sequence[Model], training: TrainingSection) -> list[Metrics]:
    import torch

    cohort = seat(adapted, [arrays for arrays, _ in models])
    adapted.model.eval()
    adapted.ready(models[0][1])
    batches = [Batch(place, data, np.arange(len(data)), 1.0, None) for place, (_, data) in enumerate(models)]
    most = training.per_device_eval_batch_size
    tokens = most * max(length(data, row) for _, data in models for row in range(len(data)))
    plan = Plan(tokens, most, memory.overhead(adapted.base.device))
    found: list[dict[int, Any]] = [{} for _ in models]
    with stacked(adapted, cohort), torch.no_grad():
        for one_pass in cut(by_length(batches), batches, plan):
            inputs, labels = one_pass.tensors(adapted.base.tokenizer, adapted.base.device)
            cohort.sit(one_pass.seats(), one_pass.time, adapted.base.device)
            with adapted.prefix.serving(one_pass.data, np.arange(len(one_pass.data))):
                outputs = iter(task.outputs(adapted.model, inputs, labels).float().cpu().numpy())
            for part in one_pass.parts:
                found[part.batch.seat] |= {row: next(outputs) for row in part.chosen}
    return [
        task.measure(np.stack([rows[row] for row in range(len(data))]), data.labels) for rows, (_, data) in zip(found, models, strict=True)
    ]
