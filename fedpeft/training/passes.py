"""A step of a cohort as forward passes: which rows of which client's batch go through the model together.

Rows do not see each other in the model, so a pass may take them from anywhere, if each meets its own client's adapter. The
rows of a step are sorted by length and cut into passes of a bounded number of tokens, each padded to its own longest row:
rows of like length beside each other. More passes have less padding, and each costs something of its own; the cut is the
cheapest there is. Gradients of a client add up over the passes that hold rows of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Indices
from fedpeft.training.masks import Masks

if TYPE_CHECKING:
    import torch

FEWEST = 128  # tokens that are worth a lane of their own


@dataclass(frozen=True)
class Batch:
    """One batch of one client, as it would go through the model alone."""

    seat: int  # the client's place in its cohort
    data: Encoded
    rows: Indices
    share: float  # of each row in the loss of the client's step
    masks: Masks | None  # None where nothing drops out


class Row(NamedTuple):
    """One row of the batches that are dealt together."""

    length: int
    batch: int  # its place among them
    place: int  # in the batch


@dataclass(frozen=True)
class Plan:
    """What a pass may hold, and what it costs whatever it holds."""

    tokens: int  # at most, with padding; but one row always
    rows: int | None = None  # at most
    overhead: int = 0  # as if it had so many tokens more


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


def deal(batches: Sequence[Batch], lanes: int, plan: Plan) -> list[list[Pass]]:
    """The passes of each lane: the rows of all batches, sorted by length, in stretches of equally many tokens, each cut for itself.

    Padding does not count. Few tokens are not worth so many lanes; there is one at least.
    """
    rows = by_length(batches)
    lengths = np.array([row.length for row in rows])
    middles, whole = np.cumsum(lengths) - lengths / 2, int(lengths.sum())
    lanes = max(1, min(lanes, len(rows), whole // FEWEST))
    borders = np.searchsorted(middles, whole * np.arange(1, lanes) / lanes).tolist()
    return [cut(rows[start:stop], batches, plan) for start, stop in itertools.pairwise([0, *borders, len(rows)]) if start < stop]


def by_length(batches: Sequence[Batch]) -> list[Row]:
    """All rows of `batches`, the longest first."""
    rows = [Row(length(batch.data, row), number, place) for number, batch in enumerate(batches) for place, row in enumerate(batch.rows)]
    return sorted(rows, key=lambda row: -row.length)


def cut(rows: Sequence[Row], batches: Sequence[Batch], plan: Plan) -> list[Pass]:
    """All rows in the passes that together cost least, neighbours in one pass; `rows` are sorted by length, the longest first.

    cost of rows j..i-1 in one pass = length_j (i - j) + plan.overhead,      cost_i = min over j of cost_j + that
    """
    lengths = np.array([row.length for row in rows])
    cost, begin = np.zeros(len(rows) + 1), np.zeros(len(rows) + 1, np.int64)
    for i in range(1, len(rows) + 1):
        j = np.arange(max(0, i - (plan.rows or i), i - max(1, plan.tokens // int(lengths[i - 1]))), i)
        padded = lengths[j] * (i - j)
        whole = np.where((padded <= plan.tokens) | (i - j == 1), cost[j] + padded + plan.overhead, np.inf)
        begin[i] = j[best := int(whole.argmin())]
        cost[i] = whole[best]
    found: list[Pass] = []
    end = len(rows)
    while end:
        found.append(_pass(rows[begin[end] : end], batches))
        end = int(begin[end])
    return found[::-1]


def _pass(rows: Sequence[Row], batches: Sequence[Batch]) -> Pass:
    chosen: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda row: (row.batch, row.place)):
        chosen.setdefault(row.batch, []).append(row.place)
    return Pass(tuple(Rows(batches[number], places) for number, places in chosen.items()))
