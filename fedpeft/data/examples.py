"""`Examples`: rows of a data set before they are tokens, with what a partitioner may look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Columns of equal length, made of a source's rows; partitioners read it; a task turns it into tensors."""

    columns: Mapping[str, Sequence[Any]]  # what the task reads: "text", "text_pair", ...
    labels: NDArray[np.int64] | None = None  # [examples], an index into label_names; where a row has several classes, the first
    label_names: tuple[str, ...] = ()
    clients: tuple[str, ...] | None = None  # [examples], the natural owner of each row
    domains: tuple[str, ...] | None = None  # [examples], where each row comes from
    label_sets: NDArray[np.bool_] | None = None  # [examples, classes], where a row has any number; of none, the label is len(label_names)
    rows: Indices | None = None  # [examples], the row of the source that each is, counted from 1
    skipped: tuple[str, ...] = ()  # rows of the source that hold nothing, each with what it lacks

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, rows: Indices) -> Examples:
        """The examples at `rows`, in that order."""
        return replace(
            self,
            columns={name: [column[row] for row in rows] for name, column in self.columns.items()},
            labels=None if self.labels is None else self.labels[rows],
            rows=None if self.rows is None else self.rows[rows],
            label_sets=None if self.label_sets is None else self.label_sets[rows],
            clients=None if self.clients is None else tuple(self.clients[row] for row in rows),
            domains=None if self.domains is None else tuple(self.domains[row] for row in rows),
        )
