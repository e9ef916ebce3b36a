"""LoRA-FAIR: the averaged A stays, and B is corrected by a residual dB so that the product comes near the ideal update.

    Abar = sum_k p_k A_k,   Bbar = sum_k p_k B_k,   dW* = sum_k p_k B_k A_k,   B' = Bbar + dB
    dB = argmin S(dW*, (Bbar + dB) Abar) + lambda ||dB||^2                                             (the paper's Eq. 8)

Clients start the next round from exactly (Abar, B'). Two solvers:

`closed_form` takes S as the squared Frobenius distance, in units of which lambda is a share of the mean eigenvalue of
Abar Abar^T (so that it means the same for every layer):
    dB = (dW* - Bbar Abar) Abar^T (Abar Abar^T + lambda I)^{-1},   dW* Abar^T = sum_k p_k B_k (A_k Abar^T)
At lambda = 0 the product is dW* projected on the row space of Abar. The residual vanishes exactly when the row space of
dW* lies inside that of Abar: when all A_k span the same rows, or when r >= d_in. It does NOT vanish for every r >= rank A_k:
independent A_k keep most of it. Between 0 and infinity the residual grows with lambda up to that of FedAvg.

`cosine` is the paper's S, 1 - the mean over columns of cos(dW*, B' Abar), minimised by gradient descent with backtracking
from dB = 0 until it stands still. The published start, a Xavier draw, leaves noise in B' that 1000 steps do not remove;
zero is a fixed point for identical clients and makes the run deterministic. Columns of dW* that are zero are left out.

Under client-level privacy only a noisy mean of the factors is released, and B' is post-processing of it: the clients' products
are not to be had, the residual is zero, and the run is that of FedAvg.

Paper: Bian et al. 2025 (arXiv:2411.14961), section 4. Rank must be the same everywhere; the head is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedpeft.products import Matrix, Product
from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy


class LoraFair(Strategy):
    """Corrects the averaged B on the server; bytes and clients are those of FedAvg."""

    paper: ClassVar[str] = "arXiv:2411.14961"
    of_factors: ClassVar[bool] = True
    from_mean: ClassVar[bool] = True

    solver: Literal["closed_form", "cosine"] = Field(
        "closed_form", description="closed_form: ridge regression; cosine: the paper's objective"
    )
    regularisation: float = Field(0.01, ge=0, description="the paper's lambda: how strongly dB is held at zero")
    max_steps: int = Field(1000, ge=1, description="most descent steps of the cosine solver")

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """The weighted mean, with B corrected."""
        arrays = aggregation.mean(updates)
        solve = {"closed_form": self._closed_form, "cosine": self._cosine}[self.solver]
        for pair in at.layout.pairs:
            A, B = arrays[pair.A].astype(np.float64), arrays[pair.B].astype(np.float64)
            ideal = aggregation.ideal(updates, pair, received).scaled(1.0 / pair.s)
            arrays[pair.B] = (B + solve(ideal, B, A)).astype(arrays[pair.B].dtype)
        return Combined(arrays, aggregation.error(updates, arrays, received, at.layout))

    def _closed_form(self, ideal: Product, B: Matrix, A: Matrix) -> Matrix:
        """dB [d_out, r] by r x r ridge regression."""
        gram = A @ A.T  # [r, r]
        ridge = self.regularisation * np.trace(gram) / len(gram)
        off = ideal.left @ (ideal.right @ A.T) - B @ gram  # (dW* - Bbar Abar) Abar^T
        eigenvalues, vectors = np.linalg.eigh(gram)
        kept = eigenvalues > len(gram) * np.finfo(np.float64).eps * max(eigenvalues.max(), 0.0)
        inverse = np.where(kept, 1.0 / np.where(kept, eigenvalues + ridge, 1.0), 0.0)
        solved: Matrix = ((off @ vectors) * inverse) @ vectors.T
        return solved

    def _cosine(self, ideal: Product, B: Matrix, A: Matrix) -> Matrix:
        """dB [d_out, r] by descent on the paper's objective; columns of the product are visited through factors of size r."""
        q, t = np.linalg.qr(ideal.left)
        core = t @ ideal.right  # columns of dW* in the basis q: [R, d_in]
        wanted = np.sqrt((core**2).sum(axis=0))  # ||dW*[:, j]||
        used = wanted > 1e-12 * max(wanted.max(initial=0.0), 1e-300)
        if not used.any():
            return np.zeros_like(B)
        core, a, wanted = core[:, used], A[:, used], wanted[used]

        def objective(dB: Matrix) -> tuple[float, Matrix]:
            P = B + dB
            gram = P.T @ P
            sizes = np.sqrt(np.maximum((a * (gram @ a)).sum(axis=0), 1e-300))  # ||P a_j||
            dots = ((P.T @ q) @ core * a).sum(axis=0)  # <dW*[:, j], P a_j>
            cosines = dots / (sizes * wanted)
            toward = q @ (core * (1.0 / (sizes * wanted)) @ a.T)  # sum_j dW*_j a_j^T / (|dW*_j| |P a_j|)
            back = P @ ((a * (cosines / sizes**2)) @ a.T)
            gradient = -(toward - back) / a.shape[1] + 2 * self.regularisation * dB
            return float(1.0 - cosines.mean() + self.regularisation * (dB**2).sum()), gradient

        return _descend(objective, np.zeros_like(B), self.max_steps)


def _descend(objective: Callable[[Matrix], tuple[float, Matrix]], x: Matrix, max_steps: int) -> Matrix:
    """Gradient descent with backtracking (Armijo) and a Barzilai-Borwein first guess of the step; stops when nothing moves."""
    value, gradient = objective(x)
    step = 1.0
    for _ in range(max_steps):
        slope = float((gradient**2).sum())
        if slope < 1e-24:
            break
        while True:
            candidate = x - step * gradient
            new, new_gradient = objective(candidate)
            if new <= value - 1e-4 * step * slope:
                break
            step /= 2
            if step < 1e-20:
                return x
        moved, turned = candidate - x, new_gradient - gradient
        curvature = float((moved * turned).sum())
        done = value - new < 1e-12
        x, value, gradient = candidate, new, new_gradient
        if done:
            break
        step = float((moved**2).sum()) / curvature if curvature > 1e-300 else 2 * step
    return x
