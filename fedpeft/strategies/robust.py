"""Robust aggregation: a minority of arbitrary updates moves the result only so far. Clients count alike, whatever n_k they claim.

    median         of every entry over the clients
    trimmed mean   of every entry, without the floor(beta K) largest and smallest
    Krum           the update with the smallest sum of squared distances to its K - f - 2 nearest
    Multi-Krum     the mean of the m updates with the smallest such sums

Each works on uploaded tensors. Over `ffa_lora` and `ro_lora` these stand for the updates themselves, A or B being common.
Over `fedavg` they are factors, and the median of A beside the median of B is not the median of B A: a config has to say
`of: factors` to accept that.

Papers: Yin et al. 2018 (arXiv:1803.01498) for median and trimmed mean; Blanchard et al. 2017 (NeurIPS) for both Krums.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedpeft.products import Matrix
from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.over import Over
from fedpeft.strategies.strategy import Combined, Round, Strategy


class Robust(Over):
    """What the four share: what they may stand over, and the report."""

    exact: ClassVar[bool] = False
    summable: ClassVar[bool] = False

    of: Literal["factors"] | None = Field(None, description='"factors" accepts that A and B are treated apart, over fedavg')

    def refuses(self, inner: Strategy) -> str | None:
        """Strategies that do more than a mean, and factors taken apart without saying so."""
        if not inner.plain_mean:
            return "it does more than average, and that would be lost"
        if not inner.exact and self.of is None:
            return "A and B would be treated apart, which is not the same for B A; say of: factors, or use over: ffa_lora"
        return None

    @abstractmethod
    def gather(self, values: Matrix) -> Matrix:
        """One row [entries] from the clients' rows [clients, entries]."""

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """All uploaded tensors at once, as one row a client."""
        names = sorted(updates[0].arrays)
        values = np.stack([np.concatenate([update.arrays[name].ravel().astype(np.float64) for name in names]) for update in updates])
        row, arrays, start = self.gather(values), {}, 0
        for name in names:
            like = updates[0].arrays[name]
            arrays[name] = row[start : start + like.size].reshape(like.shape).astype(like.dtype)
            start += like.size
        return Combined(arrays, aggregation.error(updates, arrays, received, at.layout))


class Median(Robust):
    """The median of every entry; holds against fewer than half of the clients."""

    paper: ClassVar[str] = "arXiv:1803.01498"

    def gather(self, values: Matrix) -> Matrix:
        """Column medians."""
        median: Matrix = np.median(values, axis=0)
        return median


class TrimmedMean(Robust):
    """The mean of every entry without its extremes."""

    paper: ClassVar[str] = "arXiv:1803.01498"

    beta: float = Field(0.2, gt=0, lt=0.5, description="share trimmed at either end; one client at least")

    @property
    def fewest(self) -> int:
        """One must be left."""
        return 3

    def gather(self, values: Matrix) -> Matrix:
        """Column means of the middle; trims at least one client, since trimming none would be a plain mean."""
        trimmed = max(1, math.floor(self.beta * len(values)))
        mean: Matrix = np.sort(values, axis=0)[trimmed : len(values) - trimmed].mean(axis=0)
        return mean


class Krum(Robust):
    """The one update that most others are near to."""

    paper: ClassVar[str] = "NeurIPS 2017"

    f: int = Field(1, ge=1, description="how many clients may be arbitrary; 2 f + 3 updates are needed")

    @property
    def fewest(self) -> int:
        """2 f + 3, below which the guarantee is void."""
        return 2 * self.f + 3

    def ranked(self, values: Matrix) -> list[int]:
        """Clients by their score, best first; the earlier client wins a tie."""
        gram = values @ values.T
        squares = np.diag(gram)
        distances = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
        near = len(values) - self.f - 2
        scores = [np.sort(np.delete(row, client))[:near].sum() for client, row in enumerate(distances)]
        return sorted(range(len(values)), key=lambda client: (scores[client], client))

    def gather(self, values: Matrix) -> Matrix:
        """The best row."""
        row: Matrix = values[self.ranked(values)[0]]
        return row


class MultiKrum(Krum):
    """The mean of the updates that most others are near to."""

    paper: ClassVar[str] = "NeurIPS 2017"

    m: int = Field(3, ge=1, description="how many of the best are averaged; m + f updates are needed, that none of the f is among them")

    @property
    def fewest(self) -> int:
        """As Krum, and so many that the m best need not hold an arbitrary one."""
        return max(super().fewest, self.m + self.f)

    def gather(self, values: Matrix) -> Matrix:
        """The mean of the m best rows."""
        mean: Matrix = values[sorted(self.ranked(values)[: self.m])].mean(axis=0)
        return mean
