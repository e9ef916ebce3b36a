"""The gradient of one step under example-level differential privacy, for the engine that trains one client at a time.

Rows of per-example gradients come in closed form where every trained tensor belongs to a linear layer (LoRA's factors, a
linear head), else from one backward pass an example: slow, and right for anything that does not couple examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.examples import Indices
from fedpeft.errors import Problem, UserError
from fedpeft.privacy.mechanism import Mechanism, clipped_sum, released
from fedpeft.privacy.noise import poisson
from fedpeft.privacy.per_example import Rows, uncovered, watching
from fedpeft.sections import TrainingSection
from fedpeft.training.apart import mixing
from fedpeft.training.job import Job

RowsOf = Callable[[Adapted, Any, Job, Indices, Mapping[str, Any]], Rows]


def check(adapted: Adapted) -> None:
    """Raises UserError for a model in which the gradient of an example depends on others."""
    if reason := mixing(adapted.model):
        raise UserError(Problem("privacy", f"{reason}: no example has a gradient of its own", do="take another model"))


def batch_size(adapted: Adapted, trained: Mapping[str, Any], training: TrainingSection) -> int:
    """Records of a forward pass: one where no closed form tells their gradients apart."""
    told_apart = adapted.apart.by_row and not uncovered(adapted.model, dict(trained))
    return training.per_device_train_batch_size if told_apart else 1


def parts(job: Job, mechanism: Mechanism, size: int) -> list[Indices]:
    """Draw a batch, and cut it into passes of `size` records; it may be empty."""
    rows = poisson(mechanism.noise, len(job.data), mechanism.q)
    return np.split(rows, range(size, len(rows), size)) if len(rows) else []


def into_gradients(
    adapted: Adapted, task: Any, job: Job, mechanism: Mechanism, trained: Mapping[str, Any], size: int, rows_of: RowsOf | None = None
) -> None:
    """Draw a batch, and let the gradients of the `trained` tensors be what the mechanism releases for it; `size` is `batch_size`.

    `rows_of` makes the rows of a part (an audit puts its own in); those of the loss, when it is not given.
    Of factors of a smaller rank than the model's, only what the client has is noised; the rest gets the gradient zero.
    """
    import torch

    total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    for part in parts(job, mechanism, size):
        for name, value in clipped_sum((rows_of or rows)(adapted, task, job, part, trained), mechanism.C).items():
            total[name] += value
    own = {name: value[tuple(map(slice, job.start[name].shape))] for name, value in total.items()}
    for name, gradient in released(mechanism, own).items():
        own[name].copy_(gradient)
        trained[name].grad = total[name]


def rows(adapted: Adapted, task: Any, job: Job, part: Indices, trained: Mapping[str, Any]) -> Rows:
    """The gradients of the records in `part`, [record, *shape] by parameter."""
    if not uncovered(adapted.model, dict(trained)):
        with watching(adapted.model, dict(trained), len(part)) as found:
            _losses(adapted, task, job, part).sum().backward()
        return found
    import torch

    each: dict[str, list[Any]] = {name: [] for name in trained}
    for row in part:
        adapted.model.zero_grad()
        _losses(adapted, task, job, np.array([row])).sum().backward()
        for name, parameter in trained.items():
            each[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone())
    return {name: torch.stack(gradients) for name, gradients in each.items()}


def _losses(adapted: Adapted, task: Any, job: Job, part: Indices) -> Any:
    inputs, labels = job.data.batch(part, adapted.base.tokenizer, adapted.base.device)
    with adapted.prefix.serving(job.data, part):
        losses = task.losses(adapted.model, inputs, labels)
    assert losses.shape == (len(part),), "a loss an example, or examples are coupled"
    return losses
