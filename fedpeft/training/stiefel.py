"""Adam on the Stiefel manifold: matrices X [n, r] whose columns stay orthonormal, X^T X = I, by Cayley steps.

    M <- b1 M + (1 - b1) G,   v <- b2 v + (1 - b2) ||G||_F^2 (one number),   M^ = M / (1 - b1^t),   sigma = sqrt(v / (1 - b2^t)) + eps
    Q = M^ - 1/2 X (X^T M^)                          the momentum, brought into the tangent space
    W = (Q X^T - X Q^T) / sigma                      [n, n], skew: never formed
    a = min(eta, sigma / (2 ||Q||_F))                the step, at most 1 / ||W||_2
    X <- (I + a/2 W)^{-1} (I - a/2 W) X,   M <- sigma (1 - b1^t) W X

W = L R^T with L = [Q, -X] / sigma and R = [X, Q], both [n, 2r], so that the inverse is one of a 2r x 2r matrix (Woodbury):

    (I + a/2 L R^T)^{-1} (I - a/2 L R^T) X = X - a L (I + a/2 R^T L)^{-1} R^T X

O(n r^2) time and O(n r) memory. One Newton step X <- X (3 I - X^T X) / 2 takes away what rounding adds.

Paper: Li, Fuxin and Todorovic 2020 (arXiv:2002.01113), algorithm 2, as FoRA uses it (arXiv:2605.29317). We depart from it in
three ways: the equation is solved instead of iterated five times, the step is bounded by a norm of Q instead of the
1-norm of W, and the Newton step stands where FoRA takes a QR every 200 steps. The learning rate follows the run's schedule.

All functions take matrices of many clients too, [clients, n, r].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

BETAS = (0.9, 0.99)
EPS = 1e-8


class CayleyAdam(torch.optim.Optimizer):
    """Cayley-Adam over matrices with orthonormal columns, each with its own second moment; no weight decay."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for X in group["params"]:
                if X.grad is not None:
                    state = self.state[X]
                    if not state:
                        state.update(t=0, M=torch.zeros_like(X), v=X.new_zeros(1, 1))
                    state["t"] += 1
                    move(X, X.grad, state["M"], state["v"], state["t"], X.new_tensor(group["lr"]))


class StackedCayleyAdam:
    """`CayleyAdam` on one matrix of every client, [clients, n, r]."""

    def __init__(self, X: torch.Tensor) -> None:
        self.M, self.v, self.t = torch.zeros_like(X), X.new_zeros(len(X), 1, 1), 0

    def step(self, X: torch.Tensor, G: torch.Tensor, rates: torch.Tensor) -> None:
        """Move the first clients, at their rates [clients, 1, 1]; the others have finished."""
        self.t += 1
        move(X, G, self.M[: len(X)], self.v[: len(X)], self.t, rates)


def move(X: torch.Tensor, G: torch.Tensor, M: torch.Tensor, v: torch.Tensor, t: int, eta: torch.Tensor) -> None:
    """Step t, from 1: X, the momentum M [..., n, r] and v [..., 1, 1] are changed in place by the gradient G at the rate eta."""
    b1, b2 = BETAS
    M.mul_(b1).add_(G, alpha=1 - b1)
    v.mul_(b2).add_(G.square().sum((-2, -1), keepdim=True), alpha=1 - b2)
    unbias = 1 - b1**t
    sigma = (v / (1 - b2**t)).sqrt() + EPS
    Q = tangent(X, M / unbias)
    a = torch.minimum(sigma / (2 * Q.square().sum((-2, -1), keepdim=True).sqrt() + EPS), eta)
    Y = cayley(X, Q / sigma, a)
    M.copy_(unbias * (Q @ (X.mT @ Y) - X @ (Q.mT @ Y)))
    X.copy_(Y @ (1.5 * torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device) - 0.5 * (Y.mT @ Y)))


def tangent(X: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """Q = M - 1/2 X (X^T M), so that (Q X^T - X Q^T) X is the part of M along the manifold."""
    return M - 0.5 * X @ (X.mT @ M)


def cayley(X: torch.Tensor, Q: torch.Tensor, a: torch.Tensor | float) -> torch.Tensor:
    """(I + a/2 W)^{-1} (I - a/2 W) X for W = Q X^T - X Q^T, without forming W."""
    L, R = torch.cat([Q, -X], dim=-1), torch.cat([X, Q], dim=-1)  # [..., n, 2r]
    core = torch.eye(L.shape[-1], dtype=X.dtype, device=X.device) + 0.5 * a * (R.mT @ L)
    Y: torch.Tensor = X - a * (L @ torch.linalg.solve(core, R.mT @ X))
    return Y
