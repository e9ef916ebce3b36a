"""Sequence classification: one class, or any number of classes, for a text or a pair of texts; encoders and decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Examples
from fedpeft.sections import Columns, DataSection
from fedpeft.tasks import classes

if TYPE_CHECKING:
    from fedpeft.base import Base


class SequenceClassification(classes.OfClasses):
    """Classes of a text or a pair of texts, read from the logits of `AutoModelForSequenceClassification`."""

    peft_task: ClassVar[str] = "SEQ_CLS"  # makes PEFT keep the classification head beside the adapter
    kept_by_peft: ClassVar[frozenset[str]] = frozenset({"classifier", "score"})

    multi_label: bool = Field(False, description="a text may have any number of classes: a list, or names between label_delimiter")
    label_delimiter: str = Field(",", min_length=1, description="what stands between the classes of a cell, with multi_label")

    @property
    def primary_metric(self) -> str:
        """Accuracy, or macro-F1 where a text has several classes."""
        return "macro_f1" if self.multi_label else "accuracy"

    @property
    def label_sets(self) -> bool:
        """Whether a text may have any number of classes."""
        return self.multi_label

    def roles(self, columns: Columns) -> dict[str, str]:
        """The text, and the second one of a pair."""
        return {"text": columns.text} | ({"text_pair": columns.text_pair} if columns.text_pair else {})

    def classes(self, cell: Any) -> tuple[str, ...]:
        """One class, or those of a list or a delimited cell."""
        if not self.multi_label:
            return super().classes(cell)
        names = cell if isinstance(cell, list | tuple) else str("" if cell is None else cell).split(self.label_delimiter)
        return tuple(dict.fromkeys(name for name in (str(part).strip() for part in names) if name))

    def model_class(self) -> Any:
        """The Transformers class that loads the base with a classification head."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def model_settings(self, label_count: int) -> dict[str, Any]:
        """As many outputs as classes; the problem type is for whoever loads the exported model."""
        return classes.named(label_count) | ({"problem_type": "multi_label_classification"} if self.multi_label else {})

    def encode(self, examples: Examples, base: Base, data: DataSection) -> Encoded:
        """Tokenise once. Of a text longer than `max_length` tokens the end is cut; of a pair, the end of the longer one, so that both stay.

        Decoders whose tokenizers join a pair without a mark between get a line break there.
        """
        tokenizer, pair = base.tokenizer, examples.columns.get("text_pair")
        texts = [list(examples.columns["text"])]
        if pair is not None:
            marked = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
            texts.append([text if marked else f"\n{text}" for text in pair])
        tokens = tokenizer(*texts, truncation=True, max_length=data.max_length, padding=False)
        inputs = [{name: np.asarray(tokens[name][row], dtype=np.int64) for name in tokens} for row in range(len(examples))]
        cut = sum(bool(encoding.overflowing) for encoding in tokens.encodings or ())
        return Encoded(
            inputs=inputs,
            labels=classes.targets(examples),
            label_count=len(examples.label_names),
            truncated=cut,
            left_out={row: f"{texts[0][row]!r} gives no tokens" for row, found in enumerate(inputs) if not len(found["input_ids"])},
        )
