"""FedAvg over LoRA factors, also called FedIT: both factors and the head are averaged, weighted by the clients' examples.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   p_k = n_k / sum_j n_j over the clients accepted in the round
    sum_k p_k B_k A_k - B A = sum_k p_k (B_k - B)(A_k - A)

The second line is what goes wrong: a cross-covariance of rank at most (K-1) r, reported as `aggregation_error`. It is zero
for one client, and where the clients agree on a factor.

Papers: McMahan et al. 2017 (arXiv:1602.05629), algorithm 1; Zhang et al. 2023 (arXiv:2305.05644) for LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy, streaming


class FedAvg(Strategy):
    """Weighted mean of the factors. Not the mean of the products B A: the two differ by the clients' cross-covariance."""

    paper: ClassVar[str] = "arXiv:2305.05644"
    plain_mean: ClassVar[bool] = True
    from_mean: ClassVar[bool] = True
    summable: ClassVar[bool] = True

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The n_k-weighted mean of every uploaded tensor, summed in float64 in the order of clients."""
        mean, error = aggregation.gather(updates, received, at)
        return Combined(mean, error(mean))
