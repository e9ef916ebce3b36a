"""HetLoRA: clients of different ranks; factors are cut to a client's rank on the way down and padded with zeros on the way up.

    down    A_k = first r_k rows of A,   B_k = first r_k columns of B
    local   L + lambda ||A_k[g r_k:]||_F ||B_k[:, g r_k:]||_F
    up      A = sum_k w_k pad(A_k),   B = sum_k w_k pad(B_k),   w_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F   for each matrix

Where alpha / r_k differs, factors carry the root of their scaling: pad(A_k) sqrt(s_k / s), so that what is averaged is what
each client's model had. The head is averaged by examples. Padding shrinks the rows that few clients have, and the mean of
factors is not that of products (fedavg.py).

Paper: Cho et al. 2024 (arXiv:2401.06432), section 3. Departure: ranks stay as given; the paper lets clients prune their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedpeft.products import Product, relative_error
from fedpeft.records import Arrays, Layout, Pair, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.fitting import raised
from fedpeft.strategies.strategy import Combined, Round, Strategy


class HetLora(Strategy):
    """Truncates and pads; clients weigh by the size of their update in each matrix."""

    paper: ClassVar[str] = "arXiv:2401.06432"
    of_factors: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    tail_decay: float = Field(
        0.0, ge=0, description="lambda, which shrinks the last rows and columns of a client's factors; the paper: 1e-3"
    )
    kept_share: float = Field(0.5, gt=0, le=1, description="g, the share of a client's rank that is not shrunk")

    def fit(self, arrays: Arrays, layout: Layout, own: Layout) -> tuple[Arrays, float]:
        """The first rows and columns, in the client's own scaling, and how much of the product that leaves out."""
        arrays, left_out = dict(arrays), []
        for pair, mine in zip(layout.pairs, own.pairs, strict=True):
            r, root = own.tensors[mine.A].shape[0], (pair.s / mine.s) ** 0.5
            A, B = arrays[pair.A], arrays[pair.B]
            left_out.append(relative_error(Product.of(B[:, :r], A[:r]), Product.of(B, A)))
            arrays |= {pair.A: (root * A[:r]).astype(A.dtype), pair.B: (root * B[:, :r]).astype(B.dtype)}
        return arrays, float(np.mean(left_out))

    def tail(self, at: Round) -> tuple[float, float]:
        """(lambda, g)."""
        return self.tail_decay, self.kept_share

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """The head's mean, and for each matrix the factors' mean, weighted by the sizes of the clients' updates."""
        arrays = aggregation.mean_of_the_rest(updates, at.layout)
        whole = [raised(update, at.layout) for update in updates]
        for pair in at.layout.pairs:
            w = self.weights(updates, pair, received)
            for name in (pair.A, pair.B):
                stacked = np.stack([update.arrays[name].astype(np.float64) for update in whole])
                arrays[name] = np.tensordot(w, stacked, axes=1).astype(received[name].dtype)
        return Combined(arrays, aggregation.error(updates, arrays, received, at.layout))

    def weights(self, updates: Sequence[Update], pair: Pair, received: Arrays) -> list[float]:
        """w_k; by examples where no client has moved. Clients without examples count for nothing."""
        norms = [aggregation.product(update.arrays, pair, received).norm() if update.examples else 0.0 for update in updates]
        return [norm / sum(norms) for norm in norms] if sum(norms) > 0 else aggregation.shares(updates)
