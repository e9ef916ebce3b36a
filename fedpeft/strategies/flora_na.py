"""FLoRA-NA: the factors are summed with the scalars that bring their product nearest to the ideal update.

    Ahat = sum_k u_k A_k,   Bhat = sum_k v_k B_k,   (u, v) = argmin ||sum_k p_k B_k A_k - Bhat Ahat||_F,   one pair a layer

Solved by alternating least squares from u = v = p, each half exactly, so that the error falls from that of FedAvg and never
rises above it. With v fixed, G u = h holds
    G_kj = tr((Bhat^T Bhat) A_j A_k^T),   h_k = sum_i p_i tr((Bhat^T B_i) A_i A_k^T)
and likewise with u fixed: K x K systems over r x r blocks, and no product is formed. Scalars cannot do much: LoRA-FAIR,
which has a whole B to choose, comes nearer.

Paper: arXiv:2509.26399, which descends on scalars shared by all layers; a pair a layer with a closed form is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedpeft.products import Matrix
from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy


class FloraNa(Strategy):
    """Nearly accurate aggregation at the bytes of FedAvg."""

    paper: ClassVar[str] = "arXiv:2509.26399"
    of_factors: ClassVar[bool] = True

    max_steps: int = Field(50, ge=1, description="most alternations of the least squares")

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """The weighted mean of the head, and the best scalars for every layer's factors."""
        arrays = aggregation.mean(updates)
        p = np.array(aggregation.shares(updates))
        for pair in at.layout.pairs:
            A = np.stack([update.arrays[pair.A].astype(np.float64) for update in updates])  # [client, r, d_in]
            B = np.stack([update.arrays[pair.B].astype(np.float64) for update in updates])  # [client, d_out, r]
            u, v = self._scalars(A, B, p)
            arrays[pair.A] = np.tensordot(u, A, axes=1).astype(arrays[pair.A].dtype)
            arrays[pair.B] = np.tensordot(v, B, axes=1).astype(arrays[pair.B].dtype)
        return Combined(arrays, aggregation.error(updates, arrays, received, at.layout))

    def _scalars(self, A: Matrix, B: Matrix, p: Matrix) -> tuple[Matrix, Matrix]:
        """u and v, [client] each."""
        AA = np.einsum("ird,jsd->ijrs", A, A)  # A_i A_j^T
        BB = np.einsum("idr,jds->ijrs", B, B)  # B_i^T B_j
        u = v = p
        last = np.inf
        for _ in range(self.max_steps):
            u, _ = self._half(v, p, BB, AA)
            v, gained = self._half(u, p, AA, BB)
            if abs(last - gained) <= 1e-12 * max(abs(gained), 1e-300):
                break
            last = gained
        return u, v

    @staticmethod
    def _half(fixed: Matrix, p: Matrix, ours: Matrix, theirs: Matrix) -> tuple[Matrix, float]:
        """The best scalars of one side while the other is `fixed`, and by how much they lower the squared error from ||ideal||^2."""
        square = np.einsum("i,j,ijrs->rs", fixed, fixed, ours)  # Bhat^T Bhat, or Ahat Ahat^T
        G = np.einsum("rs,kjrs->kj", square, theirs)
        h = np.einsum("i,j,ijrs,jksr->k", fixed, p, ours, theirs)  # sum_j p_j tr((Bhat^T B_j) (A_j A_k^T))
        solved: Matrix = np.linalg.lstsq(G, h, rcond=None)[0]
        return solved, float(h @ solved)
