"""What strategies share: the mean of uploads, the ideal update as a product of stacked factors, and the error against it.

Updates that are all at hand are stacked, and the error is exact. Of updates that come one by one nothing is left but sums:

    Y = sum_k p_k s_k B_k (A_k Omega),   E ||(ideal - got) Omega||^2 = m ||ideal - got||^2,   Omega [d_in, m] of random signs

m = 2 for every matrix; the relative variance of one squared norm is at most 2 / m (Hutchinson 1990), that of the sum over
matrices accordingly less, and a matrix of high rank adds little of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fedpeft import seeds
from fedpeft.arrays import Mean, weighted_mean
from fedpeft.products import Product
from fedpeft.records import Arrays, Layout, Metrics, Pair, Update
from fedpeft.strategies.strategy import Round

DIRECTIONS = 2  # m


def mean(updates: Iterable[Update]) -> Arrays:
    """sum_k p_k x_k of every uploaded tensor, p_k = n_k / sum_j n_j. Reads the updates once and keeps none."""
    found = Mean()
    for update in updates:
        found.add(update.examples, update.arrays)
        del update
    return found.taken()


def gather(updates: Iterable[Update], received: Arrays, at: Round) -> tuple[Arrays, Callable[[Arrays], Metrics]]:
    """(mean, error): the mean of the uploads, and `error` of whatever global arrays a strategy makes of it.

    Reads the updates once and keeps none, unless they are a sequence: then the error is exact and not estimated.
    """
    if isinstance(updates, Sequence):
        return mean(updates), lambda arrays: error(updates, arrays, received, at.layout)
    found, probes = Mean(), Probes(at)
    for update in updates:
        found.add(update.examples, update.arrays)
        probes.add(update, received)
        del update
    return found.taken(), lambda arrays: probes.error(arrays, received)


class Probes:
    """The ideal update seen in a few directions for each adapted matrix."""

    def __init__(self, at: Round) -> None:
        self.pairs = at.layout.pairs
        draws = seeds.generator(at.seed, "probes", at.number)
        widths = [at.layout.tensors[pair.A].shape[1] for pair in self.pairs]
        self.omega = [draws.choice(np.array([-1, 1], np.int8), (width, DIRECTIONS)) for width in widths]  # [d_in, m] for each pair
        self.seen = [np.zeros((at.layout.tensors[pair.B].shape[0], DIRECTIONS)) for pair in self.pairs]  # n Y, [d_out, m]
        self.total = 0.0

    def add(self, update: Update, received: Arrays) -> None:
        """Count one update with its examples."""
        self.total += update.examples
        for pair, omega, seen in zip(self.pairs, self.omega, self.seen, strict=True):
            one = product(update.arrays, pair, received)
            seen += update.examples * (one.left @ (one.right @ omega))

    def error(self, arrays: Arrays, received: Arrays) -> Metrics:
        """As `error` below, estimated."""
        off = size = 0.0
        for pair, omega, seen in zip(self.pairs, self.omega, self.seen, strict=True):
            got, wanted = product(arrays, pair, received), seen / self.total
            off += float(np.sum((got.left @ (got.right @ omega) - wanted) ** 2))
            size += float(np.sum(wanted**2))
        return {"aggregation_error": float(np.sqrt(off / size))} if size > 0 else {}


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
