"""RoLoRA: B trains in odd rounds, A in even ones, so that every round averages exactly.

    odd:  B <- sum_k p_k B_k, A as it was;   even:  A <- sum_k p_k A_k, B as it was

The first round trains B: with B = 0 a gradient of A would be zero. Half the bytes up. Both factors travel down, so that a
client that sat out the last round starts right; the head trains in every round.

Paper: Chen et al. 2025 (arXiv:2502.01755), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy, streaming


class RoLora(Strategy):
    """Alternates between the factors: expressive as LoRA over two rounds, exact as FFA-LoRA in each."""

    paper: ClassVar[str] = "arXiv:2502.01755"
    of_factors: ClassVar[bool] = True
    plain_mean: ClassVar[bool] = True
    from_mean: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    summable: ClassVar[bool] = True

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """The head and one of the factors."""
        frozen = {pair.A if at.number % 2 else pair.B for pair in at.layout.pairs}
        return tuple(sorted(set(names) - frozen))

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The weighted mean of the factor that moved, and of the head."""
        mean, error = aggregation.gather(updates, received, at)
        return Combined(mean, error(mean))
