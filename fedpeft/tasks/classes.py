"""What tasks with classes share: targets, losses and metrics of the logits [records, classes] of one output a class.

Targets are one class a record [records], or 0 and 1 for every class [records, classes] where a record has any number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.examples import Examples
from fedpeft.records import Metrics
from fedpeft.tasks.task import Task

if TYPE_CHECKING:
    import torch


class OfClasses(Task):
    """A task whose model puts out a logit a class."""

    def losses(self, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each record, [batch]; with several classes, the mean over all classes of their binary cross-entropies."""
        return losses(model(**inputs).logits, labels)

    def outputs(self, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Logits, [batch, classes]."""
        logits: torch.Tensor = model(**inputs).logits
        return logits

    def measure(self, outputs: NDArray[Any], labels: NDArray[Any]) -> Metrics:
        """From logits [records, classes]: see `metrics`."""
        return metrics(outputs, labels)


def named(label_count: int) -> dict[str, dict[Any, Any]]:
    """What a model's config is told of so many classes, whatever a checkpoint says of its own: their number, by names."""
    names = {code: f"LABEL_{code}" for code in range(label_count)}
    return {"id2label": names, "label2id": {name: code for code, name in names.items()}}


def targets(examples: Examples) -> NDArray[Any]:
    """What the model is to say: [examples] of int64, or [examples, classes] of float32."""
    if examples.label_sets is not None:
        return examples.label_sets.astype(np.float32)
    assert examples.labels is not None
    return examples.labels


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each record, [batch]: cross-entropy, or the mean over classes of binary cross-entropy."""
    from torch.nn import functional

    if labels.ndim == 1:
        return functional.cross_entropy(logits.float(), labels, reduction="none")
    return functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none").mean(dim=1)


def metrics(logits: NDArray[Any], labels: NDArray[Any]) -> Metrics:
    """Accuracy, macro-F1, Matthews' coefficient and mean loss; a class is predicted by the largest logit. Of two classes also F1 of
    the second.

    With any number of classes a record, each is predicted by a logit above 0; accuracy counts records that are right in every
    class, F1 and Matthews' coefficient are means over classes, and micro-F1 is over all decisions.
    """
    return _sets(logits, labels) if labels.ndim == 2 else _single(logits, labels)


def _single(logits: NDArray[Any], labels: NDArray[Any]) -> Metrics:
    predicted = logits.argmax(axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    occurring = np.union1d(predicted, labels)
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(np.mean([_f1(predicted == code, labels == code) for code in occurring])),
        "matthews": matthews(predicted, labels),
        "loss": float(-log_probability[np.arange(len(labels)), labels].mean()),
        **({"f1": _f1(predicted == 1, labels == 1)} if logits.shape[1] == 2 else {}),
    }


def _sets(logits: NDArray[Any], labels: NDArray[Any]) -> Metrics:
    predicted, truth = logits > 0, labels > 0.5
    occurring = np.flatnonzero(predicted.any(axis=0) | truth.any(axis=0))
    loss = np.maximum(logits, 0) - logits * labels + np.log1p(np.exp(-np.abs(logits)))
    return {
        "accuracy": float((predicted == truth).all(axis=1).mean()),
        "macro_f1": float(np.mean([_f1(predicted[:, code], truth[:, code]) for code in occurring])) if len(occurring) else 1.0,
        "micro_f1": _f1(predicted, truth) if len(occurring) else 1.0,
        "matthews": float(np.mean([matthews(predicted[:, code], truth[:, code]) for code in range(truth.shape[1])])),
        "loss": float(loss.mean()),
    }


def _f1(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """2 x both / (predicted + true); 0 where there is neither."""
    return 2 * float((predicted & truth).sum()) / max(1.0, float(predicted.sum() + truth.sum()))


def matthews(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """The correlation of prediction and truth, for any number of classes; 0 where either is constant.

        R = (c s - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))

    s records, c of them right, p_k predicted to be and t_k in class k (Gorodkin 2004, "Comparing two K-category assignments by
    a K-category correlation coefficient"); with two classes it is Matthews' (1975).
    """
    codes = np.union1d(predicted, labels)
    p = np.array([(predicted == code).sum() for code in codes], dtype=np.float64)
    t = np.array([(labels == code).sum() for code in codes], dtype=np.float64)
    s, c = float(len(labels)), float((predicted == labels).sum())
    spread = (s * s - p @ p) * (s * s - t @ t)
    return float((c * s - p @ t) / np.sqrt(spread)) if spread > 0 else 0.0
