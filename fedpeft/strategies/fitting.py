"""What a client of a smaller rank is sent: the best that it can hold of the global product, and how much that leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.products import Product, relative_error
from fedpeft.records import Arrays, Layout, Update


def fitted(arrays: Arrays, layout: Layout, own: Layout) -> tuple[Arrays, float]:
    """`arrays` with every pair as factors of the `own` rank, and ||s B A - s_k B_k A_k|| / ||s B A||, the mean over pairs.

    The product is cut to its first singular triples (Eckart and Young), split evenly. Where B is zero nothing is lost:
    the client gets the first rows of A as they were drawn, and zeros.
    """
    arrays, left_out = dict(arrays), []
    for pair, mine in zip(layout.pairs, own.pairs, strict=True):
        r = own.tensors[mine.A].shape[0]
        A, B = arrays[pair.A], arrays[pair.B]
        if not B.any():
            arrays |= {pair.A: A[:r].copy(), pair.B: B[:, :r].copy()}
            continue
        whole = Product.of(B, A, pair.s)
        cut = whole.truncated(r)
        left_out.append(relative_error(cut, whole))
        balance = np.sqrt(mine.s)
        arrays |= {pair.A: padded(cut.right / balance, A[:r]), pair.B: padded(cut.left / balance, B[:, :r])}
    return arrays, float(np.mean(left_out)) if left_out else 0.0


def raised(update: Update, layout: Layout) -> Update:
    """A client's update with factors of the global rank: zeros for the rest, scaled so that the global s gives its own product."""
    arrays = dict(update.arrays)
    for pair in layout.pairs:
        A, B = arrays[pair.A], arrays[pair.B]
        rows, root = layout.tensors[pair.A].shape[0], (pair.scaling(len(A)) / pair.s) ** 0.5
        arrays[pair.A] = padded(root * A, np.zeros((rows, A.shape[1]), A.dtype))
        arrays[pair.B] = padded(root * B, np.zeros((B.shape[0], rows), B.dtype))
    return replace(update, arrays=arrays)


def padded(factor: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
    """`factor` in the shape and dtype of `like`, zeros where a product has less rank than the adapter."""
    whole = np.zeros_like(like)
    whole[: factor.shape[0], : factor.shape[1]] = factor
    return whole
