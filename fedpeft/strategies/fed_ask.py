"""FedASK: two hops of sketches, from which the server has the best rank r of the ideal update, seeing nothing but sums.

    hop 1   client: Y_k = s B_k (A_k Omega)  [d_out, m]          server: Q = orthonormal basis of sum_k p_k Y_k
    hop 2   client: P_k = s A_k^T (B_k^T Q)  [d_in, m]           server: P = sum_k p_k P_k,   P^T = U S V^T
    B <- Q U_r S_r^{1/2} / s^{1/2},   A <- S_r^{1/2} V_r^T / s^{1/2}

Omega [d_in, m] is Gaussian, drawn from the run's seed, never from data. Q P^T is the ideal update if and only if m is at
least its rank: up to K r where both factors train, r where A is shared and frozen (trained: B, the paper's mode under
differential privacy). Only sums over clients are used, so secure aggregation can hide each of them.

Paper: Guo et al. 2025 (arXiv:2507.09990), algorithm 1. A client that answers hop 1 and not hop 2 counts in Q alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft import seeds
from fedpeft.products import Product
from fedpeft.records import Arrays, Pair, TensorSpec, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.fitting import padded
from fedpeft.strategies.strategy import Combined, Round, Strategy, Turn

Y, Q, P = "sketch.", "basis.", "projected."


class FedAsk(Strategy):
    """A randomised SVD of the ideal update, from two questions to each client."""

    paper: ClassVar[str] = "arXiv:2507.09990"
    of_factors: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    stateful: ClassVar[bool] = True
    summable: ClassVar[bool] = True

    sketch: int | None = Field(None, ge=1, description="m, columns of the sketch; null: the adapter's rank, as in the paper")
    trained: Literal["both", "B"] = Field("both", description='"B": A stays as received, and a sketch of rank r loses nothing')

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """All, or all but A."""
        return tuple(sorted(set(names) - (set() if self.trained == "both" else {pair.A for pair in at.layout.pairs})))

    def uploads(self, names: Sequence[str], at: Round) -> dict[str, TensorSpec]:
        """A sketch instead of factors."""
        factors = {name for pair in at.layout.pairs for name in (pair.A, pair.B)}
        rest = {name: at.layout.tensors[name] for name in self.trains(names, at) if name not in factors}
        return rest | {Y + pair.module: self._form(at, pair, at.layout.tensors[pair.B].shape[0]) for pair in at.layout.pairs}

    def answers(self, at: Round) -> dict[str, TensorSpec]:
        """P_k of every matrix."""
        return {P + pair.module: self._form(at, pair, at.layout.tensors[pair.A].shape[1]) for pair in at.layout.pairs}

    def _form(self, at: Round, pair: Pair, rows: int) -> TensorSpec:
        A = at.layout.tensors[pair.A]
        return TensorSpec((rows, self.sketch or A.shape[0]), A.dtype)

    def omega(self, at: Round, pair: Pair) -> NDArray[np.float64]:
        """Omega [d_in, m], the same on both sides in every round."""
        A = at.layout.tensors[pair.A]
        number = [each.module for each in at.layout.pairs].index(pair.module)
        return seeds.generator(at.seed, "fed_ask", client=number).standard_normal((A.shape[1], self.sketch or A.shape[0]))

    # --- client

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """Y_k and the head travel; the factors are remembered for the second hop."""
        whole = {**start, **trained}
        factors = {name: whole[name] for pair in turn.at.layout.pairs for name in (pair.A, pair.B)}
        upload = {name: array for name, array in trained.items() if name not in factors}
        for pair in turn.at.layout.pairs:
            A, B = (factors[name].astype(np.float64) for name in (pair.A, pair.B))
            upload[Y + pair.module] = (pair.s * B @ (A @ self.omega(turn.at, pair))).astype(factors[pair.A].dtype)
        return upload, {**factors, "round": np.array(turn.at.number)}

    def answer(self, turn: Turn, asked: Arrays) -> Arrays:
        """P_k. Raises KeyError when the factors of this round are not remembered."""
        if int(turn.memory["round"]) != turn.at.number:
            raise KeyError("round")
        answer = {}
        for pair in turn.at.layout.pairs:
            A, B = (turn.memory[name].astype(np.float64) for name in (pair.A, pair.B))
            answer[P + pair.module] = (pair.s * A.T @ (B.T @ asked[Q + pair.module].astype(np.float64))).astype(turn.memory[pair.A].dtype)
        return answer

    # --- server

    def second(self, updates: Sequence[Update], at: Round) -> Arrays:
        """Q of every matrix."""
        mean = aggregation.mean(updates)
        return {Q + pair.module: _basis(mean[Y + pair.module]) for pair in at.layout.pairs}

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """The head's mean, and the factors of the best rank r of Q P^T; `received` holds the Q that clients were asked with."""
        mean = aggregation.mean(updates)
        arrays = {name: array for name, array in mean.items() if not name.startswith((Y, P))}
        for pair in at.layout.pairs:
            A, B = received[pair.A], received[pair.B]
            best = Product.of(received[Q + pair.module], mean[P + pair.module].T).truncated(len(A))
            root = pair.s**0.5
            arrays |= {pair.A: padded(best.right / root, A), pair.B: padded(best.left / root, B)}
        return Combined(arrays)


def _basis(sketch: NDArray[Any]) -> NDArray[Any]:
    """Orthonormal columns that span those of `sketch`, in its shape: zeros where it has more columns than rows."""
    q = np.linalg.qr(sketch.astype(np.float64))[0]
    return padded(q, sketch)
