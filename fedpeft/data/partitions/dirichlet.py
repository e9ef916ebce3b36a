"""dirichlet: label skew; a client has much of some classes and little of others.

Paper: Hsu, Qi and Brown 2019, arXiv:1909.06335, in the form of Li et al. 2022, arXiv:2102.02079 (section 4.1): the draw
is over clients for each class, so sizes differ too.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.data.examples import Examples, Indices
from fedpeft.data.partitions import Movable, needed


def dirichlet(
    examples: Examples,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: Annotated[float, Field(ge=1e-6, le=1e6, description="the smaller, the fewer clients share a class; large: like iid")] = 0.3,
) -> list[Indices]:
    """For each class c draw q_c ~ Dir(alpha, ..., alpha) over clients, and give client k the share q_ck of the class.

    The shuffled class is cut at its rounded cumulative shares, so that no example is lost. The split may leave clients
    short of `partition.min_examples`, all the more for a small alpha: Li et al. draw again; so does `split`, and as a last
    resort it moves examples from the largest clients.
    """
    labels = needed(examples.labels, "label", "dirichlet")
    pieces: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        for own, piece in zip(pieces, cut(rows, generator.dirichlet(np.full(clients, alpha))), strict=True):
            own.append(piece)
    return Movable(np.sort(np.concatenate([np.empty(0, dtype=np.int64), *own])) for own in pieces)


def cut(rows: Indices, shares: NDArray[np.float64]) -> list[Indices]:
    """Consecutive pieces of `rows` in proportion to `shares`, each within one row of its share."""
    ends = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
    return np.split(rows, ends)
