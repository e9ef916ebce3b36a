"""FedSVD: FFA-LoRA whose A turns with the update: the server refactors B A after averaging B.

    B' = sum_k p_k B_k,   B' A = U S V^T (thin),   A <- V_r^T,   B <- U_r S_r

Exact, since B' A has rank at most r. A has orthonormal rows, which bounds the gradient of B by that of the output. Only B
and the head travel up; both factors travel down. A round in which B is still zero keeps A, since V would be arbitrary.
V_r spans the rows of A: A turns, but never leaves the row space it was drawn with.

Paper: Lee et al. 2025 (arXiv:2505.12805), algorithm 1. The published code forms B A; here it is a QR of each factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedpeft.products import Product
from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy, streaming


class FedSvd(Strategy):
    """Trains B; the server turns A to the right singular vectors of the averaged update."""

    paper: ClassVar[str] = "arXiv:2505.12805"
    of_factors: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    from_mean: ClassVar[bool] = True

    svd_period: int = Field(1, ge=1, description="refactor after every so many rounds")

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """All but A."""
        return tuple(sorted(set(names) - {pair.A for pair in at.layout.pairs}))

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The mean of B, refactored with A."""
        arrays, error = aggregation.gather(updates, received, at)
        if at.number % self.svd_period == 0:
            for pair in at.layout.pairs:
                B, A = arrays[pair.B], received[pair.A]
                U, S, Vt = Product.of(B, A).svd()
                if S.any():
                    arrays[pair.A], arrays[pair.B] = np.zeros_like(A), np.zeros_like(B)  # rows beyond min(d_out, d_in) stay zero
                    arrays[pair.A][: len(Vt)] = Vt
                    arrays[pair.B][:, : len(S)] = U * S
        return Combined(arrays, error(arrays))
