"""Server optimisers: the clients' mean is a direction, and the server takes its own step along it.

    Delta = what was combined - what was sent,   m = 0 and v = tau^2 before the first round
    FedAvgM     m <- beta m + Delta;                        x <- x + eta m
    FedAdam     m <- b1 m + (1-b1) Delta;  v <- b2 v + (1-b2) Delta^2;                     x <- x + eta m / (sqrt(v) + tau)
    FedYogi     m as FedAdam;              v <- v - (1-b2) Delta^2 sign(v - Delta^2);      x as FedAdam
    FedAdagrad  m <- Delta;                v <- v + Delta^2;                               x as FedAdam

Each works `over` a strategy that combines the updates. Momentum is a memory of directions: it means nothing over a strategy
that turns the basis of the factors, and such a pair is refused. Where a factor is frozen in a round (RoLoRA), neither its
value nor its moments move. With Adam every entry of an adapter moves by about eta a round: 1e-3 to 1e-2 suit LoRA.

Papers: Hsu et al. 2019 (arXiv:1909.06335) for FedAvgM; Reddi et al. 2021 (arXiv:2003.00295), algorithm 2, for the others,
which keep v in float64 here and, like the paper, correct no bias.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from pydantic import Field

from fedpeft.products import Matrix
from fedpeft.records import Arrays
from fedpeft.strategies.over import Over
from fedpeft.strategies.strategy import Strategy


class ServerOptimizer(Over):
    """What the four share: Delta, and moments of the tensors that were combined."""

    paper: ClassVar[str] = "arXiv:2003.00295"
    exact: ClassVar[bool] = False
    from_mean: ClassVar[bool] = True

    def refuses(self, inner: Strategy) -> str | None:
        """Strategies that refactor."""
        return "it turns the basis of the factors, and moments are remembered in the old one" if inner.refactors else None

    @property
    def floor(self) -> float:
        """v before the first round."""
        return 0.0

    @abstractmethod
    def move(self, delta: Matrix, m: Matrix, v: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """(the step, next m, next v) of one tensor."""

    def apply(self, arrays: Arrays, combined: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        """x + step for what was combined; the moments go into the state as m/NAME and v/NAME."""
        arrays, state = dict(arrays), dict(state)
        for name in sorted(combined):
            x = arrays[name].astype(np.float64)
            m = state.get(f"m/{name}", np.zeros_like(x))
            v = state.get(f"v/{name}", np.full_like(x, self.floor))
            step, state[f"m/{name}"], state[f"v/{name}"] = self.move(combined[name].astype(np.float64) - x, m, v)
            arrays[name] = (x + step).astype(arrays[name].dtype)
        return arrays, state


class FedAvgM(ServerOptimizer):
    """Momentum on the server."""

    paper: ClassVar[str] = "arXiv:1909.06335"

    server_learning_rate: float = Field(1.0, gt=0, description="eta, the server's step size")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="beta, how much of the last direction is kept")

    def move(self, delta: Matrix, m: Matrix, v: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """Heavy-ball momentum; v is not used."""
        m = self.server_momentum * m + delta
        return self.server_learning_rate * m, m, v


class Adaptive(ServerOptimizer):
    """What FedAdam, FedYogi and FedAdagrad share: a step of its own size for every entry."""

    server_learning_rate: float = Field(1e-2, gt=0, description="eta: about how far every entry moves in a round")
    tau: float = Field(1e-3, gt=0, description="adaptivity: below this, directions are not stretched")

    @property
    def floor(self) -> float:
        """tau^2."""
        return self.tau**2

    def step(self, m: Matrix, v: Matrix) -> Matrix:
        """eta m / (sqrt(v) + tau)."""
        step: Matrix = self.server_learning_rate * m / (np.sqrt(v) + self.tau)
        return step


class Moments(Adaptive):
    """What FedAdam and FedYogi share: directions and squares that fade."""

    b1: float = Field(0.9, ge=0, lt=1, description="how much of the last direction is kept")
    b2: float = Field(0.99, ge=0, lt=1, description="how much of the last squares is kept")

    def first(self, delta: Matrix, m: Matrix) -> Matrix:
        """b1 m + (1 - b1) Delta."""
        return self.b1 * m + (1 - self.b1) * delta


class FedAdam(Moments):
    """Adam on the server."""

    def move(self, delta: Matrix, m: Matrix, v: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """v forgets at the rate b2."""
        m, v = self.first(delta, m), self.b2 * v + (1 - self.b2) * delta**2
        return self.step(m, v), m, v


class FedYogi(Moments):
    """Yogi on the server: v moves towards the squares by a bounded amount."""

    def move(self, delta: Matrix, m: Matrix, v: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """v forgets no faster than the squares are large."""
        m, v = self.first(delta, m), v - (1 - self.b2) * delta**2 * np.sign(v - delta**2)
        return self.step(m, v), m, v


class FedAdagrad(Adaptive):
    """Adagrad on the server: v never forgets."""

    def move(self, delta: Matrix, m: Matrix, v: Matrix) -> tuple[Matrix, Matrix, Matrix]:
        """v is the sum of all squares; there is no momentum."""
        v = v + delta**2
        return self.step(delta, v), delta, v
