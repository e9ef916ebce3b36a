"""Arithmetic over dicts of arrays. Names are visited in sorted order and sums are kept in float64, so order never matters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from fedpeft.records import Arrays


def difference(left: Arrays, right: Arrays) -> Arrays:
    """left - right for the names of `left`, in float64."""
    return {name: left[name].astype(np.float64) - right[name].astype(np.float64) for name in sorted(left)}


def norm(arrays: Arrays) -> float:
    """Euclidean norm over all entries of all arrays."""
    return float(np.sqrt(sum(float(np.vdot(a, a).real) for a in (arrays[name].astype(np.float64) for name in sorted(arrays)))))


def weighted_mean(weighted: Iterable[tuple[float, Arrays]], like: Arrays) -> Arrays:
    """sum_k n_k x_k / sum_k n_k, streamed: holds one float64 accumulator whatever the number of clients.

    The result has the dtypes of `like`. Raises ZeroDivisionError when the weights add up to nothing.
    """
    total = 0.0
    sums = {name: np.zeros(like[name].shape, np.float64) for name in sorted(like)}
    for weight, arrays in weighted:
        total += weight
        for name, into in sums.items():
            into += weight * arrays[name].astype(np.float64)
    if total <= 0:
        raise ZeroDivisionError("the weights of the selected clients add up to zero")
    return {name: (into / total).astype(like[name].dtype) for name, into in sums.items()}


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
