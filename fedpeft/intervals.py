"""How sure a mean over a few seeds is: Student's t and the interval that it gives."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

CONFIDENCE = 0.95


Key = TypeVar("Key")


def best(scores: Mapping[Key, float], higher_is_better: bool) -> Key:
    """Whose score is best, the first of equals; what is no number is worse than any. Raises ValueError for none.

    >>> best({"a": math.nan, "b": 2.0, "c": 1.0}, higher_is_better=False)
    'c'
    """
    sign = 1 if higher_is_better else -1
    return max(scores, key=lambda key: (math.isfinite(scores[key]), sign * scores[key] if math.isfinite(scores[key]) else 0.0))


class Estimate(NamedTuple):
    """A mean and how far to either side of it the interval goes; None for what the number of values does not give."""

    values: int
    mean: float | None
    half_width: float | None


def estimate(values: Iterable[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of the values and its interval, mean +- t s / sqrt(n) with n - 1 degrees of freedom.

    >>> f"{estimate([1.0, 2.0, 3.0]).half_width:.4f}"
    '2.4841'
    >>> estimate([1.0])
    Estimate(values=1, mean=1.0, half_width=None)
    """
    found = list(values)
    if not found:
        return Estimate(0, None, None)
    if len(found) == 1:
        return Estimate(1, found[0], None)
    if not all(map(math.isfinite, found)):
        return Estimate(len(found), math.nan, math.nan)
    spread = statistics.stdev(found) / math.sqrt(len(found))
    return Estimate(len(found), statistics.fmean(found), student_t(confidence, len(found) - 1) * spread)


def student_t(confidence: float, degrees: int) -> float:
    """The t for which |T| <= t with probability `confidence`, at a whole number of degrees of freedom.

    With t = sqrt(degrees) tan(theta) that probability is a finite sum in sin and cos of theta: Abramowitz and Stegun,
    Handbook of Mathematical Functions (1964), 26.7.3 (odd) and 26.7.4 (even). It rises with theta, so bisection finds it.
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(theta))."""
    odd, square = degrees % 2, math.cos(theta) ** 2
    factors = ((2 * k - 1 + odd) / (2 * k + odd) * square for k in range(1, degrees // 2))
    terms = itertools.accumulate(factors, lambda term, factor: term * factor, initial=math.cos(theta) if odd else 1.0)
    total = math.sin(theta) * math.fsum(terms) if degrees > 1 else 0.0
    return 2 / math.pi * (theta + total) if odd else total
