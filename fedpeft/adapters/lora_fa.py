"""LoRA-FA: A stays as it was drawn, and B follows the full gradient as closely as A lets it.

    g_B = s G A^T,   G = dL/dW                       what autograd gives
    B <- step(B, g_B (A A^T)^{-1} / s^2)             the minimiser of || s g A - G ||_F over g

One step of SGD moves W by -eta G A^T (A A^T)^{-1} A: the full gradient step projected on A's row space, whatever s is and
however A is conditioned. Under Adam the factor 1 / s^2 cancels. A is public and fixed, so that the correction of a noisy
gradient is post-processing; all clients have the same A, so that averaging B is exact, and only B travels.

The correction is a `Rules` multiplier, computed here in float64. PEFT's own optimiser multiplies in bfloat16 wherever that is
available, on CPUs too: its corrected gradient is off by 2e-3 (tests/contracts/test_adapters.py measures it), so it is not used.

Paper: Zhang et al. 2023 (arXiv:2308.03303), and its second version for the correction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpeft.adapters.lora import ONE, Lora
from fedpeft.errors import Problem, UserError
from fedpeft.records import Arrays, Layout
from fedpeft.strategies.strategy import Round
from fedpeft.training.rules import Rules


class LoraFa(Lora):
    """LoRA with A frozen and B's gradient corrected by (A A^T)^{-1} / s^2. Averages exactly, sends half."""

    def check_strategy(self, strategy: Any) -> None:
        """As LoRA; the strategy has to train B in every round, and to do no more than average it."""
        super().check_strategy(strategy)
        rounds = (Round(number, 2, Layout({}, (ONE,))) for number in (1, 2))
        does_more = strategy.of_factors and not strategy.plain_mean
        if does_more or any(ONE.B not in strategy.trains((ONE.A, ONE.B), at) for at in rounds):
            got = f"{type(strategy).__name__} changes A or asks for it, and lora_fa keeps A as it was drawn"
            raise UserError(Problem("strategy.name", got, do="use strategy fedavg, which is exact here, or adapter lora"))

    def resting(self, layout: Layout, arrays: Arrays) -> frozenset[str]:
        """Every A."""
        return frozenset(pair.A for pair in layout.pairs)

    def rules(self, layout: Layout, start: Arrays) -> Rules:
        """The correction of every B, at this client's own A and s."""
        multipliers = {}
        for pair in layout.pairs:
            A = start[pair.A].astype(np.float64)
            multipliers[pair.B] = (np.linalg.pinv(A @ A.T, hermitian=True) / pair.s**2).astype(np.float32)
        return Rules(multipliers=multipliers)
