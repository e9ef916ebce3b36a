"""Low-rank products: sums, norms and best approximations of L @ R without ever forming the [d_out, d_in] matrix.

Aggregation of LoRA is stated on products: the update of client k is s_k B_k A_k, and the ideal update of a round is
sum_k p_k s_k B_k A_k. Stacking factors makes that one `Product` of rank sum_k r_k; a thin QR of each side leaves an
SVD of a small core. Everything is float64 inside: [d_out, R] and [R, d_in] are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Product:
    """The matrix left @ right, kept as its factors."""

    left: Matrix  # [d_out, R]
    right: Matrix  # [R, d_in]

    @classmethod
    def of(cls, B: NDArray[Any], A: NDArray[Any], s: float = 1.0) -> Product:
        """s * B @ A in float64."""
        return cls(s * B.astype(np.float64), A.astype(np.float64))

    @classmethod
    def sum(cls, products: Sequence[Product]) -> Product:
        """The sum of products, by stacking: left [d_out, sum R], right [sum R, d_in]."""
        return cls(np.concatenate([p.left for p in products], axis=1), np.concatenate([p.right for p in products], axis=0))

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Columns of `left`: an upper bound on the rank of the matrix."""
        return int(self.left.shape[1])

    def compressed(self) -> Product:
        """The same matrix with a rank of at most min(d_out, d_in), where stacking has gone beyond it."""
        if self.rank <= min(self.shape):
            return self
        if self.shape[0] <= self.shape[1]:
            q, t = np.linalg.qr(self.right.T)  # right = t^T q^T, t [d_in or R, R]
            left: Matrix = self.left @ t.T
            return Product(np.eye(self.shape[0]), left @ q.T) if left.shape[1] > self.shape[0] else Product(left, q.T)
        transposed = Product(self.right.T, self.left.T).compressed()
        return Product(transposed.right.T, transposed.left.T)

    def scaled(self, factor: float) -> Product:
        """factor * left @ right."""
        return Product(factor * self.left, self.right)

    def __sub__(self, other: Product) -> Product:
        return Product.sum([self, other.scaled(-1.0)])

    def inner(self, other: Product) -> float:
        """<self, other> = tr((L2^T L1)(R1 R2^T)), O((d_out + d_in) R1 R2)."""
        return float(np.sum((self.left.T @ other.left) * (self.right @ other.right.T)))

    def norm(self) -> float:
        """Frobenius norm, from triangular factors, so that it is accurate also near zero."""
        return float(np.linalg.norm(self._core()[2]))

    def _core(self) -> tuple[Matrix, Matrix, Matrix]:
        """Q1, Q2 and T1 T2^T with left = Q1 T1, right^T = Q2 T2."""
        q1, t1 = np.linalg.qr(self.left)
        q2, t2 = np.linalg.qr(self.right.T)
        return q1, q2, t1 @ t2.T

    def svd(self) -> tuple[Matrix, Matrix, Matrix]:
        """U [d_out, m], S [m], V^T [m, d_in] with m = min(R, d_out, d_in); signs are fixed so that equal input gives equal output."""
        q1, q2, core = self._core()
        u, S, vt = np.linalg.svd(core, full_matrices=False)
        U, Vt = q1 @ u, vt @ q2.T
        signs = np.sign(U[np.abs(U).argmax(axis=0), np.arange(U.shape[1])])
        signs[signs == 0] = 1.0
        return U * signs, S, Vt * signs[:, None]

    def truncated(self, r: int) -> Product:
        """The best approximation of rank `r` in the Frobenius norm (Eckart and Young), split evenly: (U sqrt(S), sqrt(S) V^T)."""
        U, S, Vt = (part[..., :r] if part.ndim < 2 or i == 0 else part[:r] for i, part in enumerate(self.svd()))
        root = np.sqrt(S)
        return Product(U * root, root[:, None] * Vt)

    def dense(self) -> Matrix:
        """The matrix itself, [d_out, d_in]; for tests and for a backbone whose rank is full anyway."""
        return self.left @ self.right


def leading(G: NDArray[Any], k: int, tolerance: float = 1e-9) -> tuple[Matrix, Matrix, Matrix]:
    """U [d_out, k], S [k], V^T [k, d_in]: the first k singular triples of a dense matrix, k well below its dimensions.

    Block power iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4) from a fixed start, until the
    singular values stand still to `tolerance` of the largest; O(d_out d_in k) a pass, where an SVD is cubic. Small
    matrices, and those whose singular values do not part in 50 passes, get the SVD.
    """
    G = G.astype(np.float64)
    width = 2 * k + 8
    if width < min(G.shape) // 2:
        Q = np.linalg.qr(G @ np.random.default_rng(0).standard_normal((G.shape[1], width)))[0]
        before = np.full(k, np.inf)
        for _ in range(50):
            Z = np.linalg.qr(G.T @ Q)[0]
            Q, T = np.linalg.qr(G @ Z)
            u, S, vt = np.linalg.svd(T)
            if np.abs(S[:k] - before).max() <= tolerance * S[0]:
                return Q @ u[:, :k], S[:k], vt[:k] @ Z.T
            before = S[:k]
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    return U[:, :k], S[:k], Vt[:k]


def relative_error(got: Product, wanted: Product) -> float:
    """||got - wanted|| / ||wanted||, and 0 when both are zero."""
    size = wanted.norm()
    off = (got - wanted).norm()
    return off / size if size > 0 else (0.0 if off == 0 else float("inf"))
