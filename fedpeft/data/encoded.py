"""`Encoded`: examples as tensors, unpadded, from which batches are cut; padding never exceeds the longest of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.examples import Indices

if TYPE_CHECKING:
    import torch

TOKENS, LABELS = "input_ids", "labels"
UNTRAINED = -100  # the label of a token that is read and not learnt, padding included: torch's and Transformers' number


@dataclass(frozen=True)
class Encoded:
    """Examples of one client, or of the server's test split, as a task's `encode` made them."""

    inputs: list[dict[str, NDArray[Any]]]  # per example: input_ids, attention_mask, ... each [time]; or pixel_values
    labels: NDArray[Any]  # [examples], or [examples, classes], or [examples] of objects: each [time], a label a token
    label_count: int
    truncated: int = 0  # examples that lost their end to max_length
    left_out: Mapping[int, str] = field(default_factory=dict)  # rows that cannot be used, each with the reason
    patches: int = 0  # tokens that every example becomes, where they are no words

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Indices) -> Encoded:
        """The examples at `rows`, in that order, without those that are left out; tensors are shared, not copied."""
        kept = np.array([row for row in rows if row not in self.left_out], dtype=np.int64) if self.left_out else rows
        return Encoded([self.inputs[row] for row in kept], self.labels[kept], self.label_count, patches=self.patches)

    def usable(self) -> Encoded:
        """The examples that are not left out, in order."""
        return self.take(np.arange(len(self)))

    def length(self, row: int) -> int:
        """Tokens of one example: what it takes of a pass."""
        return self.patches or len(self.inputs[row][TOKENS])

    def batch(self, rows: Indices, tokenizer: Any, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs and labels, [batch, time] padded to the longest row on the tokenizer's side where they are tokens."""
        import torch

        chosen = [self.inputs[row] for row in rows]
        inputs = {name: _together([row[name] for row in chosen], name, tokenizer) for name in chosen[0]}
        labels = _together(list(self.labels[rows]), LABELS, tokenizer) if self.labels.dtype == object else self.labels[rows]
        return {name: torch.from_numpy(values).to(device) for name, values in inputs.items()}, torch.from_numpy(labels).to(device)

    def by_length(self, size: int) -> Iterator[Indices]:
        """All rows in batches of like length: the least padding, for passes in which order does not matter."""
        order = np.argsort([self.length(row) for row in range(len(self))], kind="stable")
        for start in range(0, len(order), size):
            yield order[start : start + size]


def _together(values: list[NDArray[Any]], name: str, tokenizer: Any) -> NDArray[Any]:
    """One array of a batch: tokens are padded, pictures stand side by side."""
    if values[0].ndim != 1:
        return np.stack(values)
    of_tokenizer = {TOKENS: "pad_token_id", "token_type_ids": "pad_token_type_id"}
    value = UNTRAINED if name == LABELS else getattr(tokenizer, of_tokenizer[name]) if name in of_tokenizer else 0
    return padded(values, value, tokenizer.padding_side)


def padded(rows: Sequence[NDArray[Any]], value: int, side: str) -> NDArray[Any]:
    """Rows of any length as [rows, longest], filled up with `value` on the "left" or the "right"."""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        out[place, slice(out.shape[1] - len(row), None) if side == "left" else slice(len(row))] = row
    return out


def joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of all parts, one part after another."""
    inputs, labels = [row for part in parts for row in part.inputs], np.concatenate([part.labels for part in parts])
    return Encoded(inputs, labels, parts[0].label_count, patches=parts[0].patches)


def digest(parts: Sequence[Encoded]) -> str:
    """16 hex digits that are equal when tokens or pictures, and labels, are, part by part."""
    sha = hashlib.sha256()
    for part in parts:
        for label in part.labels if part.labels.dtype == object else [part.labels]:
            sha.update(label.tobytes() + b"|")
        for row in part.inputs:
            sha.update(next(iter(row.values())).tobytes() + b"|")
    return sha.hexdigest()[:16]
