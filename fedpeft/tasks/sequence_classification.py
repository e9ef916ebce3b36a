"""Sequence classification: one class for a text, or for a pair of texts; encoders and decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings
from fedpeft.records import Metrics
from fedpeft.sections import Columns

if TYPE_CHECKING:
    import torch


class SequenceClassification(Settings):
    """One class a text, read from the logits of `AutoModelForSequenceClassification`."""

    @property
    def peft_task(self) -> str:
        """PEFT's name of the task; it makes PEFT keep the classification head beside the adapter."""
        return "SEQ_CLS"

    @property
    def primary_metric(self) -> str:
        """The metric that stands for the run; higher is better."""
        return "accuracy"

    def roles(self, columns: Columns) -> dict[str, str]:
        """Which column plays which part in an example."""
        return {"text": columns.text} | ({"text_pair": columns.text_pair} if columns.text_pair else {})

    def model_class(self) -> Any:
        """The Transformers class that loads the base with a classification head."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def encode(self, examples: Examples, tokenizer: Any, max_length: int) -> Encoded:
        """Tokenise once. Of a text longer than `max_length` tokens the end is cut; of a pair, the end of the longer one."""
        assert examples.labels is not None
        pair = examples.columns.get("text_pair")
        texts = [list(examples.columns["text"])] + ([list(pair)] if pair is not None else [])
        tokens = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
        inputs = [{name: np.asarray(tokens[name][row], dtype=np.int64) for name in tokens} for row in range(len(examples))]
        empty = next((row for row, tokens in enumerate(inputs) if not len(tokens["input_ids"])), None)
        if empty is not None:
            raise UserError(Problem("data.columns.text", f"the text {texts[0][empty]!r} gives no tokens", do="drop such rows"))
        cut = sum(bool(encoding.overflowing) for encoding in tokens.encodings or ())
        return Encoded(inputs=inputs, labels=examples.labels, label_count=len(examples.label_names), truncated=cut)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each record, [batch]: records are not coupled, so their mean may be clipped one by one."""
        from torch.nn import functional

        return functional.cross_entropy(logits.float(), labels, reduction="none")

    def measure(self, logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Metrics:
        """From logits [records, classes]: accuracy, mean F1 of the classes that occur or are predicted, mean cross-entropy; of two
        classes also F1 of the second."""
        predicted = logits.argmax(axis=1)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return {
            "accuracy": float((predicted == labels).mean()),
            "macro_f1": _macro_f1(predicted, labels),
            "loss": float(-log_probability[np.arange(len(labels)), labels].mean()),
            **({"f1": _f1(predicted == 1, labels == 1)} if logits.shape[1] == 2 else {}),
        }


def _macro_f1(predicted: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    return float(np.mean([_f1(predicted == code, labels == code) for code in np.union1d(predicted, labels)]))


def _f1(predicted: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    """2 x both / (predicted + true); 0 where there is neither."""
    return 2 * float((predicted & truth).sum()) / max(1.0, float(predicted.sum() + truth.sum()))
