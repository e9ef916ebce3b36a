"""`Encoded`: examples as tokens, unpadded, from which batches are cut; padding never exceeds the longest of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.examples import Indices

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples of one client, or of the server's test split."""

    inputs: list[dict[str, NDArray[np.int64]]]  # per example: input_ids, attention_mask, ... each [time]
    labels: NDArray[np.int64]  # [examples]
    label_count: int
    truncated: int = 0  # examples that lost their end to max_length

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Indices) -> Encoded:
        """The examples at `rows`, in that order; tokens are shared, not copied."""
        return Encoded([self.inputs[row] for row in rows], self.labels[rows], self.label_count)

    def batch(self, rows: Indices, tokenizer: Any, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs [batch, time], padded to the longest row on the tokenizer's side, and labels [batch]."""
        import torch

        padded = tokenizer.pad([self.inputs[row] for row in rows], padding=True, return_tensors="np")
        return {name: torch.from_numpy(padded[name]).to(device) for name in padded}, torch.from_numpy(self.labels[rows]).to(device)

    def by_length(self, size: int) -> Iterator[Indices]:
        """All rows in batches of like length: the least padding, for passes in which order does not matter."""
        order = np.argsort([len(row["input_ids"]) for row in self.inputs], kind="stable")
        for start in range(0, len(order), size):
            yield order[start : start + size]


def digest(parts: Sequence[Encoded]) -> str:
    """16 hex digits that are equal when tokens and labels are, part by part."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.labels.tobytes() + b"|")
        for row in part.inputs:
            sha.update(row["input_ids"].tobytes() + b"|")
    return sha.hexdigest()[:16]
