"""What strategies share: the mean of uploads, the ideal update as a product of stacked factors, and the error against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpeft.arrays import weighted_mean
from fedpeft.products import Product
from fedpeft.records import Arrays, Layout, Metrics, Pair, Update


def mean(updates: Sequence[Update]) -> Arrays:
    """sum_k p_k x_k of every uploaded tensor, p_k = n_k / sum_j n_j."""
    return weighted_mean(((update.examples, update.arrays) for update in updates), like=updates[0].arrays)


def mean_of_the_rest(updates: Sequence[Update], layout: Layout) -> Arrays:
    """The mean of what is no factor: of factors, clients of different ranks have no plain mean."""
    factors = {name for pair in layout.pairs for name in (pair.A, pair.B)}
    like = {name: array for name, array in updates[0].arrays.items() if name not in factors}
    return weighted_mean(((update.examples, update.arrays) for update in updates), like)


def shares(updates: Sequence[Update]) -> list[float]:
    """p_k, the weights of the updates, which add up to 1."""
    total = sum(update.examples for update in updates)
    return [update.examples / total for update in updates]


def product(arrays: Arrays, pair: Pair, received: Arrays) -> Product:
    """s B A, or s B R A, with the scaling of the rank that A has; a factor that is not in `arrays` is the one received."""
    A, B = (arrays.get(name, received[name]) for name in (pair.A, pair.B))
    whole = Product.of(B, A, pair.scaling(len(A)))
    if pair.core is None:
        return whole
    return Product(whole.left @ arrays.get(pair.core, received[pair.core]).astype(np.float64), whole.right)


def ideal(updates: Sequence[Update], pair: Pair, received: Arrays) -> Product:
    """sum_k p_k s_k B_k A_k, of rank at most sum_k r_k, never formed."""
    weighted = zip(shares(updates), updates, strict=True)
    return Product.sum([product(update.arrays, pair, received).scaled(p) for p, update in weighted]).compressed()


def error(updates: Sequence[Update], arrays: Arrays, received: Arrays, layout: Layout) -> Metrics:
    """{"aggregation_error": ||sum_k p_k s_k B_k A_k - s B A - merged|| / ||sum_k p_k s_k B_k A_k||} over all adapted matrices."""
    off = size = 0.0
    for pair in layout.pairs:
        wanted = ideal(updates, pair, received)
        got = product(arrays, pair, received)
        for left in (name for name in arrays if name.endswith(f".{pair.module}.left")):
            got = Product.sum([got, Product.of(arrays[left], arrays[left.removesuffix("left") + "right"])])
        off += (got - wanted).norm() ** 2
        size += wanted.norm() ** 2
    return {"aggregation_error": float(np.sqrt(off / size))} if size > 0 else {}
