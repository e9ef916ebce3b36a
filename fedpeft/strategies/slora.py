"""SLoRA: the first rounds train a sparse part of the weights themselves; what they learn becomes the start of LoRA.

    stage 1, rounds 1..R_1   D = sum_k p_k D_k, values at fixed random positions of W, the same on all clients; y = W x + D x
    the switch               D = U S V^T,   B = U_r S_r^{1/2} / s^{1/2},   A = S_r^{1/2} V_r^T / s^{1/2},   D <- 0
    stage 2                  FedAvg of A and B

Positions follow from the run's seed. Their number is, by default, that of the numbers in A and B, so that both stages send
as many bytes. Averages of D are exact; what the switch leaves out is in its report.

Paper: Babakniya et al. 2023 (arXiv:2308.06522), section 4. The split of S is even here; a re-implementation that is in use
draws other positions for every client and round, which makes the sum dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft import seeds
from fedpeft.errors import Problem, UserError
from fedpeft.products import leading
from fedpeft.records import Arrays, Layout, Update, sparse_name
from fedpeft.strategies import aggregation
from fedpeft.strategies.fitting import padded
from fedpeft.strategies.strategy import Combined, Round, Strategy, streaming


class Slora(Strategy):
    """A sparse warm-up that gives LoRA its start, then FedAvg."""

    paper: ClassVar[str] = "arXiv:2308.06522"
    of_factors: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    summable: ClassVar[bool] = True
    noise_proof: ClassVar[bool] = False  # per-example gradients of sparse values are not at hand

    warmup_rounds: int = Field(3, ge=1, description="R_1, rounds of sparse training")
    density: float | None = Field(
        None, gt=0, le=1, description="share of each weight that trains in them; null: as many numbers as A and B"
    )

    def check_config(self, config: Any, adapter: Any) -> None:
        """Stage 2 must come."""
        super().check_config(config, adapter)
        if config.strategy.num_rounds <= self.warmup_rounds:
            got = f"{self.warmup_rounds} of {config.strategy.num_rounds} rounds, and LoRA would never train"
            raise UserError(Problem("strategy.warmup_rounds", got, f"below {config.strategy.num_rounds}"))

    def sparse(self, layout: Layout, seed: int) -> Mapping[str, NDArray[np.int64]]:
        """The positions of each weight, sorted."""
        found = {}
        for number, pair in enumerate(layout.pairs):
            (r, d_in), d_out = layout.tensors[pair.A].shape, layout.tensors[pair.B].shape[0]
            density = self.density or min(1.0, r * (d_in + d_out) / (d_in * d_out))
            count = max(1, round(density * d_in * d_out))
            found[pair.module] = np.sort(seeds.generator(seed, "slora", client=number).choice(d_in * d_out, count, replace=False))
        return found

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """What trains in this stage; the rest is as it was drawn."""
        return self.trains(names, at)

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """The sparse values, or A and B; and the head."""
        factors = {name for pair in at.layout.pairs for name in (pair.A, pair.B)}
        values = {sparse_name(pair.module) for pair in at.layout.pairs}
        return tuple(sorted(set(names) - (factors if at.number <= self.warmup_rounds else values)))

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The mean; at the end of stage 1 its best factors, and zeros for the sparse values."""
        if at.number > self.warmup_rounds:
            arrays, error = aggregation.gather(updates, received, at)
            return Combined(arrays, error(arrays))
        arrays = aggregation.mean(updates)
        if at.number < self.warmup_rounds:
            return Combined(arrays, {"aggregation_error": 0.0})
        left_out = size = 0.0
        positions = self.sparse(at.layout, at.seed)
        for pair in at.layout.pairs:
            A, B, name = received[pair.A], received[pair.B], sparse_name(pair.module)
            D = np.zeros((B.shape[0], A.shape[1]))
            D.flat[positions[pair.module]] = arrays[name]
            U, S, Vt = leading(D, min(len(A), *D.shape))
            root = np.sqrt(S / pair.s)
            arrays |= {pair.A: padded(root[:, None] * Vt, A), pair.B: padded(U * root, B), name: np.zeros_like(arrays[name])}
            left_out, size = left_out + np.sum((D - (U * S) @ Vt) ** 2), size + np.sum(D**2)
        return Combined(arrays, {"aggregation_error": float(np.sqrt(left_out / size))} if size else {})
