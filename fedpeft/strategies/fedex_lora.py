"""FedEx-LoRA: FedAvg of the factors, and what that gets wrong is merged into the backbone.

    A <- Abar,   B <- Bbar,   W <- W + s (sum_k p_k B_k A_k - Bbar Abar)
    sum_k p_k B_k A_k - Bbar Abar = sum_{k < K} (B_k - B_K) p_k (A_k - Abar)

The second line has rank at most (K-1) r, and is how the residual travels: as factors. It is kept as float32 factors beside
the base. Exact in every round; but what clients drifted apart stays in the backbone, which many local steps make worse.

Paper: Singhal et al. 2024 (arXiv:2410.09432), equation 8. The published code averages uniformly and transposes the residual,
which only square matrices forgive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fedpeft.products import Product
from fedpeft.records import Arrays, Update, merge_names
from fedpeft.strategies import aggregation
from fedpeft.strategies.fitting import raised
from fedpeft.strategies.strategy import Combined, Round, Strategy


class FedexLora(Strategy):
    """Exact by a residual in the backbone."""

    paper: ClassVar[str] = "arXiv:2410.09432"
    of_factors: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """The weighted means, and the residual to be merged."""
        plain, updates = updates, [raised(update, at.layout) for update in updates]
        arrays = aggregation.mean(updates)
        p = aggregation.shares(updates)
        for pair in at.layout.pairs if len(updates) > 1 else ():
            A_mean, last = arrays[pair.A].astype(np.float64), updates[-1].arrays[pair.B].astype(np.float64)
            left = [update.arrays[pair.B].astype(np.float64) - last for update in updates[:-1]]
            right = [
                share * (update.arrays[pair.A].astype(np.float64) - A_mean) for share, update in zip(p[:-1], updates[:-1], strict=True)
            ]
            residual = Product(pair.s * np.concatenate(left, axis=1), np.concatenate(right)).compressed()
            names = merge_names(at.number, pair.module)
            dtype = arrays[pair.A].dtype
            arrays |= {names[0]: residual.left.astype(dtype), names[1]: residual.right.astype(dtype)}
        return Combined(arrays, aggregation.error(plain, arrays, received, at.layout))
