"""Evaluation of one adapter on encoded examples: dropout off, no gradients, batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.records import Arrays, Metrics
from fedpeft.sections import TrainingSection
from fedpeft.tasks.task import Task


def of_every_record(adapted: Adapted, data: Encoded, batch_size: int, ask: Callable[..., Any]) -> np.ndarray[Any, Any]:
    """What `ask(model, inputs, labels)` gives for every example, [examples, numbers], in the order of `data`."""
    import torch

    out: np.ndarray[Any, Any] | None = None
    adapted.model.eval()
    adapted.ready(data)
    with torch.no_grad():
        for rows in data.by_length(batch_size):
            inputs, labels = data.batch(rows, adapted.base.tokenizer, adapted.base.device)
            with adapted.prefix.serving(data, rows):
                got = ask(adapted.model, inputs, labels).float().cpu().numpy()
            if out is None:
                out = np.empty((len(data), got.shape[1]), np.float32)
            out[rows] = got
    assert out is not None, "evaluation needs at least one example"
    return out


def logits(adapted: Adapted, data: Encoded, batch_size: int) -> np.ndarray[Any, Any]:
    """What a model with one output a class puts out for every example, [examples, classes]."""
    return of_every_record(adapted, data, batch_size, lambda model, inputs, labels: model(**inputs).logits)


def evaluate(adapted: Adapted, task: Task, arrays: Arrays, data: Encoded, batch_size: int) -> Metrics:
    """The task's metrics of the model with `arrays`."""
    adapted.write(arrays)
    return task.measure(of_every_record(adapted, data, batch_size, task.outputs), data.labels)


def each(adapted: Adapted, task: Task, models: Sequence[tuple[Arrays, Encoded]], training: TrainingSection) -> list[Metrics]:
    """The task's metrics of many models, each on its own data, one after another."""
    return [evaluate(adapted, task, arrays, data, training.per_device_eval_batch_size) for arrays, data in models]
