"""FlexLoRA: the ideal update itself is taken, and cut back to what an adapter can hold.

    M = sum_k p_k s B_k A_k = U S V^T,   B <- U_r S_r^{1/2} / s^{1/2},   A <- S_r^{1/2} V_r^T / s^{1/2}

The best approximation of rank r (Eckart and Young): the error is that of the singular values left out. The SVD is of a core
of stacked factors, never of M. The split is even, so that A and B stay of a size; the paper leaves all of S on B.

Paper: Bai et al. 2024 (arXiv:2402.11505), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy


class FlexLora(Strategy):
    """The SVD of the averaged update, redistributed."""

    paper: ClassVar[str] = "arXiv:2402.11505"
    of_factors: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """The mean of the head, and the best factors of rank r."""
        arrays = aggregation.mean_of_the_rest(updates, at.layout)
        for pair in at.layout.pairs:
            A, B = np.zeros_like(received[pair.A]), np.zeros_like(received[pair.B])
            best = aggregation.ideal(updates, pair, received).truncated(len(A)).scaled(1 / pair.s)
            balance = np.sqrt(pair.s)  # of the even split of M, s^{-1} stands on the left: share it out
            A[: best.rank], B[:, : best.rank] = best.right / balance, best.left * balance
            arrays |= {pair.A: A, pair.B: B}
        return Combined(arrays, aggregation.error(updates, arrays, received, at.layout))
