"""FFA-LoRA: A stays as it was drawn, equal everywhere; only B (and the head) trains and travels.

    B <- sum_k p_k B_k,   so that   sum_k p_k s B_k A = s B A   exactly

Half the bytes up, and half down: A follows from the run's seed, and each client's A is held to the server's by a digest.
alpha and the learning rate are one setting: with SGD the trajectory of s B A is the same under (s, eta) -> (c s, eta / c^2).

Paper: Sun et al. 2024 (arXiv:2403.12313), section 4. The paper's learning rates are about ten times those of LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy, streaming


class FfaLora(Strategy):
    """Freezes A: averages exactly, sends half, and under differential privacy adds no noise to a product of two noises."""

    paper: ClassVar[str] = "arXiv:2403.12313"
    of_factors: ClassVar[bool] = True
    plain_mean: ClassVar[bool] = True
    from_mean: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    summable: ClassVar[bool] = True

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """All but A."""
        frozen = {pair.A for pair in at.layout.pairs}
        return tuple(sorted(set(names) - frozen))

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """All but A."""
        return self.sends(names, at)

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The weighted mean of B and the head; exact, which the report shows."""
        mean, error = aggregation.gather(updates, received, at)
        return Combined(mean, error(mean))
