"""FLoRA: the clients' factors are stacked, and the stack is merged into the backbone; adapters start afresh in every round.

    A_st = [p_1 A_1; ...; p_K A_K],   B_st = [B_1 ... B_K],   B_st A_st = sum_k p_k B_k A_k   exactly
    W <- W + s B_st A_st,   A <- a new random draw,   B <- 0

The weight stands on one factor only. What is merged is kept as float32 factors beside the base, of rank K r a round, and
travels to every client once: K times the bytes of FedAvg down. The exported adapter is one LoRA of a higher rank.

Paper: Wang et al. 2024 (arXiv:2409.05976), equation 5. Draws of A come from the server, so that all clients share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from fedpeft import seeds
from fedpeft.records import Arrays, Update, merge_names
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy


class Flora(Strategy):
    """Exact by stacking; every round a new low-rank space, and a cold start."""

    paper: ClassVar[str] = "arXiv:2409.05976"
    of_factors: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    mixed_ranks: ClassVar[bool] = True

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """The mean of the head, the stack to be merged, and fresh factors."""
        arrays = aggregation.mean_of_the_rest(updates, at.layout)
        generator = seeds.generator(at.seed, "flora", at.number)
        for pair in at.layout.pairs:
            left, right = merge_names(at.number, pair.module)
            stack = aggregation.ideal(updates, pair, received)
            A = received[pair.A]
            bound = 1 / np.sqrt(A.shape[1])  # Kaiming-uniform with a = sqrt(5), PEFT's own draw
            arrays |= {left: stack.left.astype(A.dtype), right: stack.right.astype(A.dtype)}
            arrays |= {pair.A: generator.uniform(-bound, bound, A.shape).astype(A.dtype), pair.B: np.zeros_like(received[pair.B])}
        return Combined(arrays, aggregation.error(updates, arrays, received, at.layout))
