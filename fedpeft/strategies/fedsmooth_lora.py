"""FedSmoothLoRA: merge every round, and give each client a start that continues its own last model and its own gradient.

W is the backbone with t merges done, (B_c, A_c) a client's own last upload, made in round tau; all of rank r, s the scaling.

    1  M_rm = zeta_t (B_c A_c - sum of B_j A_j merged since that upload)         Round-Matching; 0 without a memory
    2  G = dL/dW at W + s M_rm, without LoRA, over a few local batches           [d_out, d_in]
    3  G = U S V^T,   A_ga = c V[:, :r]^T,   B_ga = c U[:, r:2r],   c = d_out^{1/4} / gamma^{1/2},   W_ga = B_ga A_ga
    4  train (B, A) from SVD_r(W_ga + M_rm), or from (B_ga, A_ga) without a memory, on the frozen W - s W_ga
    5  upload (B_c, A_c) = SVD_r(B' A' - W_ga), and remember it
    6  server: (B_s, A_s) = SVD_r(sum_c p_c B_c A_c);   W <- W + s B_s A_s, kept as fp32 factors beside the base

zeta is constant, or falls as zeta_min + (zeta - zeta_min) (1 + cos(pi t / T)) / 2. With zeta = 1 and no truncation a client
starts exactly where it ended. W_ga has r equal singular values sqrt(d_out) / gamma; those of G are not used.

Paper: arXiv:2605.29460. Departures, each where the published code is wrong or silent: weights p_c go with their own client;
a client without a memory starts from the backbone (the code starts it from the last global model); one that sat out rounds
subtracts all merges since its upload, not the last alone; the gradient is taken with dropout off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.errors import Problem, UserError
from fedpeft.products import Product, leading
from fedpeft.records import Arrays, Layout, Pair, Update, merge_names, merged_module, merged_round
from fedpeft.strategies import aggregation
from fedpeft.strategies.fitting import padded
from fedpeft.strategies.strategy import Combined, Round, Strategy, Turn


class FedSmoothLora(Strategy):
    """Merges, matches rounds and aligns the start with the client's gradient; clients remember their last upload."""

    paper: ClassVar[str] = "arXiv:2605.29460"
    of_factors: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    noise_proof: ClassVar[bool] = False
    stateful: ClassVar[bool] = True

    zeta: float = Field(1.0, ge=0, le=1, description="how far a client returns to its own last model")
    zeta_min: float = Field(0.0, ge=0, le=1, description="where a falling zeta ends")
    zeta_schedule: Literal["constant", "cosine"] = Field("cosine", description="constant suits alike clients, cosine unlike ones")
    gamma: float = Field(64.0, gt=0, description="the larger, the smaller the gradient-aligned start")
    gradient_batches: int = Field(8, ge=1, description="local batches that the gradient is averaged over")

    def check(self, layout: Layout) -> None:
        """Needs LoRA factors, and layers in which 2 r singular directions exist."""
        super().check(layout)
        for pair in layout.pairs:
            r, smallest = layout.tensors[pair.A].shape[0], min(layout.tensors[pair.B].shape[0], layout.tensors[pair.A].shape[1])
            if 2 * r > smallest:
                got = f"{r} is more than half of the {smallest} dimensions of {pair.module}, and fedsmooth_lora needs 2 r directions"
                raise UserError(Problem("adapter.r", got, f"at most {smallest // 2}"))

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """The head alone, beside what was merged: A and B do not outlive a round."""
        factors = {name for pair in at.layout.pairs for name in (pair.A, pair.B)}
        return tuple(sorted(set(names) - factors))

    def zeta_at(self, at: Round) -> float:
        """zeta_t with t = number - 1 merges done, of T rounds."""
        if self.zeta_schedule == "constant":
            return self.zeta
        return self.zeta_min + 0.5 * (self.zeta - self.zeta_min) * (1 + math.cos(math.pi * (at.number - 1) / at.total))

    # --- client

    def begin(self, turn: Turn) -> Arrays:
        """Steps 1 to 4: the factors to start from, and the shift -s W_ga of the backbone as a merge of the coming round."""
        pairs = {pair.module: pair for pair in turn.at.layout.pairs}
        matching = {module: self.matching(turn, pair) for module, pair in pairs.items()}
        shifts: Arrays = {}
        for module, M in matching.items():
            if M is not None:
                left, right = merge_names(turn.at.number, module)
                shifts |= {left: (pairs[module].s * M.left).astype(np.float32), right: M.right.astype(np.float32)}
        start = dict(turn.received)
        for module, gradient in turn.gradients({**turn.received, **shifts}, self.gradient_batches):
            pair, M = pairs[module], matching[module]
            W_ga = self.aligned(gradient, turn.received[pair.A].shape[0])
            first = W_ga if M is None else Product.sum([W_ga, M]).truncated(W_ga.rank)
            left, right = merge_names(turn.at.number, module)
            start |= {left: (-pair.s * W_ga.left).astype(np.float32), right: W_ga.right.astype(np.float32)}
            start |= {pair.A: padded(first.right, turn.received[pair.A]), pair.B: padded(first.left, turn.received[pair.B])}
        return start

    def matching(self, turn: Turn, pair: Pair) -> Product | None:
        """Step 1, M_rm; None for a client without a memory."""
        if pair.A not in turn.memory:
            return None
        since = [
            Product.of(turn.received[name], turn.received[name.removesuffix("left") + "right"], -1.0 / pair.s)
            for name in turn.received
            if name.endswith(".left") and merged_module(name) == pair.module and merged_round(name) >= int(turn.memory["round"])
        ]
        mine = Product.of(turn.memory[pair.B], turn.memory[pair.A])
        return Product.sum([mine, *since]).scaled(self.zeta_at(turn.at))

    def aligned(self, G: NDArray[Any], r: int) -> Product:
        """Step 3: W_ga from the gradient [d_out, d_in]: A takes the first r right vectors, B the next r left ones."""
        U, _, Vt = leading(G, 2 * r)
        c = G.shape[0] ** 0.25 / self.gamma**0.5
        return Product(c * U[:, r : 2 * r], c * Vt[:r])

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """Step 5: what is uploaded, and what is remembered."""
        upload = dict(trained)
        for pair in turn.at.layout.pairs:
            left, right = merge_names(turn.at.number, pair.module)
            minus_W_ga = Product.of(start[left], start[right], 1.0 / pair.s)
            r = trained[pair.A].shape[0]
            cut = Product.sum([Product.of(trained[pair.B], trained[pair.A]), minus_W_ga]).truncated(r)
            upload |= {pair.A: padded(cut.right, trained[pair.A]), pair.B: padded(cut.left, trained[pair.B])}
        factors = {name: upload[name] for pair in turn.at.layout.pairs for name in (pair.A, pair.B)}
        return upload, {**factors, "round": np.array(turn.at.number)}

    # --- server

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """Step 6: the head's mean, and the best rank-r approximation of the ideal update, to be merged; A and B stay as drawn."""
        mean = aggregation.mean(updates)
        factors = {name for pair in at.layout.pairs for name in (pair.A, pair.B)}
        arrays = {name: array for name, array in mean.items() if name not in factors}
        for pair in at.layout.pairs:
            left, right = merge_names(at.number, pair.module)
            best = aggregation.ideal(updates, pair, received).truncated(received[pair.A].shape[0])
            dtype = received[pair.A].dtype
            arrays |= {left: best.left.astype(dtype), right: best.right.astype(dtype)}
        return Combined(arrays, aggregation.error(updates, arrays, received, at.layout))
