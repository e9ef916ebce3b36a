"""Evaluation of one adapter on tokenised examples: dropout off, no gradients, batches of like length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.records import Arrays, Metrics
from fedpeft.sections import TrainingSection


def logits(adapted: Adapted, data: Encoded, batch_size: int) -> np.ndarray[Any, Any]:
    """What the model puts out for every example, [examples, outputs], in the order of `data`."""
    import torch

    out: np.ndarray[Any, Any] | None = None
    adapted.model.eval()
    adapted.prefix.ready(data)
    with torch.no_grad():
        for rows in data.by_length(batch_size):
            inputs, _ = data.batch(rows, adapted.base.tokenizer, adapted.base.device)
            with adapted.prefix.serving(data, rows):
                got = adapted.model(**inputs).logits.float().cpu().numpy()
            if out is None:
                out = np.empty((len(data), got.shape[1]), np.float32)
            out[rows] = got
    assert out is not None, "evaluation needs at least one example"
    return out


def evaluate(adapted: Adapted, task: Any, arrays: Arrays, data: Encoded, batch_size: int) -> Metrics:
    """The task's metrics of the model with `arrays`."""
    adapted.write(arrays)
    metrics: Metrics = task.measure(logits(adapted, data, batch_size), data.labels)
    return metrics


def each(adapted: Adapted, task: Any, models: Sequence[tuple[Arrays, Encoded]], training: TrainingSection) -> list[Metrics]:
    """The task's metrics of many models, each on its own data, one after another."""
    return [evaluate(adapted, task, arrays, data, training.per_device_eval_batch_size) for arrays, data in models]
