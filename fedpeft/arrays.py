"""Arithmetic over dicts of arrays. Names are visited in sorted order and sums are kept in float64, so order never matters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from fedpeft.records import BESIDE, Arrays


def difference(left: Arrays, right: Arrays) -> Arrays:
    """left - right for the names of `left`, in float64."""
    return {name: left[name].astype(np.float64) - right[name].astype(np.float64) for name in sorted(left)}


def norm(arrays: Arrays) -> float:
    """Euclidean norm over all entries of all arrays."""
    return float(np.sqrt(sum(float(np.vdot(a, a).real) for a in (arrays[name].astype(np.float64) for name in sorted(arrays)))))


def movement(arrays: Arrays, start: Arrays) -> float:
    """How far `arrays` went from where they started; what started nowhere counts from zero, what is beside the adapter not at all."""
    moved = {name: array for name, array in arrays.items() if not name.startswith(BESIDE)}
    return norm({**moved, **difference({name: moved[name] for name in moved if name in start}, start)})


def beyond(norm: float, most: float) -> str | None:
    """Why an update that went so far is not to be believed; None when it may be."""
    return f"over norm: {norm:.3g} above strategy.max_update_norm {most:.3g}" if norm > most else None


def weighted_mean(weighted: Iterable[tuple[float, Arrays]], like: Arrays) -> Arrays:
    """sum_k n_k x_k / sum_k n_k, streamed: holds one float64 accumulator whatever the number of clients.

    The result has the dtypes of `like`. Raises ZeroDivisionError when the weights add up to nothing.
    """
    mean = Mean()
    for weight, arrays in weighted:
        mean.add(weight, {name: arrays[name] for name in like})
    return mean.taken()


class Mean:
    """sum_k n_k x_k / sum_k n_k of arrays that come one after another: one float64 accumulator, in the order of coming."""

    def __init__(self) -> None:
        self.total = 0.0
        self._sums: Arrays = {}
        self._dtypes: dict[str, np.dtype[np.generic]] = {}

    def add(self, weight: float, arrays: Arrays) -> None:
        """Count `arrays`, which have the names and shapes of those before, with `weight`."""
        if not self._sums:
            self._sums = {name: np.zeros(arrays[name].shape, np.float64) for name in sorted(arrays)}
            self._dtypes = {name: arrays[name].dtype for name in arrays}
        self.total += weight
        for name, into in self._sums.items():
            into += np.multiply(arrays[name], weight, dtype=np.float64)

    def taken(self) -> Arrays:
        """The mean, in the dtypes of the first arrays; the sums are given up on the way, so that both never stand whole.

        Raises ZeroDivisionError when the weights add up to nothing.
        """
        if self.total <= 0:
            raise ZeroDivisionError("the weights of the selected clients add up to zero")
        return {name: (self._sums.pop(name) / self.total).astype(self._dtypes[name]) for name in list(self._sums)}


def total(many: Iterable[Arrays]) -> Arrays:
    """Entry-wise sum in float64 of arrays with equal names and shapes."""
    sums: Arrays = {}
    for arrays in many:
        for name in sorted(arrays):
            sums[name] = sums[name] + arrays[name] if name in sums else arrays[name].astype(np.float64)
    return sums


def digest(arrays: Arrays) -> str:
    """sha256 over names, dtypes, shapes and bytes: equal digests mean bit-identical arrays."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
