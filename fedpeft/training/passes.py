"""A step of a cohort as forward passes: which rows of which client's batch go through the model together.

Rows do not see each other in the model, so a pass may take them from anywhere, if each meets its own client's adapter. The
rows of a step are sorted by length and cut into passes of a bounded number of tokens, each padded to its own longest row:
less padding than any client has alone. Gradients of a client add up over the passes that hold rows of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Indices
from fedpeft.training.masks import Masks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """One batch of one client, as it would go through the model alone."""

    seat: int  # the client's place in its cohort
    data: Encoded
    rows: Indices
    share: float  # of each row in the loss of the client's step
    masks: Masks | None  # None where nothing drops out


@dataclass(frozen=True)
class Rows:
    """The rows of a pass that belong to one batch; they stand together in the pass."""

    batch: Batch
    chosen: list[int]  # places in the batch, ascending


@dataclass(frozen=True)
class Pass:
    """What goes through the model at once; rows are sorted by seat."""

    parts: tuple[Rows, ...]

    def tensors(self, tokenizer: Any, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Inputs [rows, time] and labels [rows]."""
        return self.data.batch(np.arange(len(self.data)), tokenizer, device)

    @functools.cached_property
    def data(self) -> Encoded:
        """The examples of all rows."""
        inputs = [part.batch.data.inputs[part.batch.rows[place]] for part in self.parts for place in part.chosen]
        labels = np.concatenate([part.batch.data.labels[part.batch.rows[part.chosen]] for part in self.parts])
        return Encoded(inputs, labels, self.parts[0].batch.data.label_count)

    @property
    def time(self) -> int:
        """Tokens of every row, padding included."""
        return max(length(part.batch.data, int(part.batch.rows[place])) for part in self.parts for place in part.chosen)

    def of_rows(self, values: Sequence[float] | Sequence[int]) -> list[Any]:
        """One value a part, said again for every row of it."""
        return [value for value, part in zip(values, self.parts, strict=True) for _ in part.chosen]

    def seats(self) -> list[int]:
        """The client of every row."""
        return self.of_rows([part.batch.seat for part in self.parts])

    def shares(self) -> list[float]:
        """The weight of every row in its client's loss."""
        return self.of_rows([part.batch.share for part in self.parts])


def length(data: Encoded, row: int) -> int:
    """Tokens of one example."""
    return data.length(row)


def pools(batches: Iterable[Batch], tokens: int) -> Iterator[list[Batch]]:
    """Batches in turn, as many together as have `tokens` with their own padding: their masks stand in memory at once."""
    pool: list[Batch] = []
    held = 0
    for batch in batches:
        size = len(batch.rows) * max(length(batch.data, int(row)) for row in batch.rows)
        if pool and held + size > tokens:
            yield pool
            pool, held = [], 0
        pool.append(batch)
        held += size
    if pool:
        yield pool


def cut(batches: Sequence[Batch], tokens: int, most: int | None = None) -> Iterator[Pass]:
    """All rows of `batches` in passes of at most `tokens` with padding, and `most` rows, but at least one; the longest rows first."""
    rows = [(length(batch.data, row), number, place) for number, batch in enumerate(batches) for place, row in enumerate(batch.rows)]
    rows.sort(key=lambda row: -row[0])
    while rows:
        size = max(1, min(tokens // rows[0][0], most or len(rows)))
        chosen: dict[int, list[int]] = {}
        for _, number, place in sorted(rows[:size], key=lambda row: row[1:]):
            chosen.setdefault(number, []).append(place)
        yield Pass(tuple(Rows(batches[number], places) for number, places in chosen.items()))
        rows = rows[size:]
