"""Whether a private step does what is accounted for it: checks of what is released, by what goes in and what comes out.

They know nothing of how a step is made. `Audited` lets somebody decide who takes part in a step and gives back what the step
releases, times the fixed denominator: the clipped sum and its noise. Thresholds are such that a right step fails one time in
about ten million; a wrong one fails at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

CHANCE = 1e-7
LOOKED_AT = 5  # members whose contributions are looked at one by one
DRAWS = 1000  # of who takes part
CLOSE = 2e-3  # relative, of sums in float32

Vector = NDArray[np.float64]


class Audited(Protocol):
    """A mechanism: n members (examples, clients), each taking part with probability q, clipped to C, noise sigma C on the sum."""

    n: int
    q: float
    sigma: float
    C: float

    def release(self, chosen: Sequence[int], sigma: float, C: float) -> Vector:
        """Denominator x what a step releases for just these members, every number in one row; the noise is a fresh one."""

    def noises(self) -> list[tuple[str, Vector]]:
        """(of what, sigma C x noise) of several steps and rounds, started as a run starts them."""

    def draw(self) -> Sequence[int]:
        """Who takes part in a step, as a run draws it."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold. `said` is what was measured."""

    name: str
    passed: bool
    said: str


def noise_size(audited: Audited) -> Check:
    """A step without anybody, and one with a few, release Gaussian noise of sigma C."""
    from scipy.stats import chi2, kstest

    name, some = "noise of sigma C in every step, with and without members", list(range(min(LOOKED_AT, audited.n)))
    without = audited.release(some, 0.0, audited.C)
    size = audited.sigma * audited.C
    worst, said = True, []
    few = audited.release(some, audited.sigma, audited.C) - without
    for who, found in (("nobody", audited.release([], audited.sigma, audited.C)), ("some", few)):
        scaled = found / size
        inside = chi2.ppf(CHANCE, len(scaled)) < float((scaled**2).sum()) < chi2.isf(CHANCE, len(scaled))
        gaussian = float(kstest(scaled, "norm").pvalue) > CHANCE
        worst = worst and inside and gaussian
        said.append(f"{who}: {scaled.std():.4f} sigma C{'' if gaussian else ', not Gaussian'}")
    return Check(name, worst, "; ".join(said))


def clipping(audited: Audited) -> Check:
    """Each member alone counts for C at most, and for exactly C where C is small."""
    members = range(min(LOOKED_AT, audited.n))
    free = [float(np.linalg.norm(audited.release([member], 0.0, math.inf))) for member in members]
    small = 0.5 * min((norm for norm in free if norm > 0), default=0.0)
    at_most = max(float(np.linalg.norm(audited.release([member], 0.0, audited.C))) for member in members)
    exact = [float(np.linalg.norm(audited.release([member], 0.0, small))) / small for member in members] if small else [0.0]
    passed = at_most <= audited.C * (1 + CLOSE) and all(abs(ratio - 1) < CLOSE for ratio in exact)
    said = f"at most {at_most / audited.C:.4f} C; with a small C, {min(exact):.4f} to {max(exact):.4f} C"
    return Check("one member counts for C at most", passed, said)


def addition(audited: Audited) -> Check:
    """What several release together is the sum of what each releases alone: nobody's part depends on who else is there."""
    members = list(range(min(LOOKED_AT, audited.n)))
    alone = [audited.release([member], 0.0, audited.C) for member in members]
    worst = 0.0
    for count in range(2, len(members) + 1):
        together, summed = audited.release(members[:count], 0.0, audited.C), np.sum(alone[:count], axis=0)
        worst = max(worst, float(np.linalg.norm(together - summed)) / max(float(np.linalg.norm(summed)), 1e-12))
    return Check("members add up, over a fixed denominator", worst < CLOSE, f"off by {worst:.2g} of the sum")


def freshness(audited: Audited) -> Check:
    """The noise of no two steps, rounds or repetitions of a round is related."""
    drawn = audited.noises()
    worst, which = 0.0, ""
    for i, (left, x) in enumerate(drawn):
        for right, y in drawn[:i]:
            spread = float(x.std() * y.std())
            found = abs(float(((x - x.mean()) * (y - y.mean())).mean()) / spread) if spread > 0 else 1.0
            worst, which = max((worst, which), (found, f"{right} and {left}"))
    limit = 6 / math.sqrt(len(drawn[0][1]))
    return Check("noise is never used twice", worst < limit, f"largest correlation {worst:.3g} ({which}), limit {limit:.3g}")


def sampling(audited: Audited) -> Check:
    """Each member takes part with probability q by itself: right on average, and as scattered as coins are."""
    n, q = audited.n, audited.q
    drawn = np.zeros((DRAWS, n), np.float32)
    for row in drawn:
        row[list(audited.draw())] = 1
    if q >= 1:
        return Check("everybody takes part", bool(drawn.all()), f"{drawn.mean():.4f} of {DRAWS} draws")
    from scipy.stats import binom

    low, high = binom.ppf(CHANCE / n, DRAWS, q), binom.isf(CHANCE / n, DRAWS, q)
    counts, sizes = drawn.sum(axis=0), drawn.sum(axis=1)
    spread = float(sizes.var() / (n * q * (1 - q)))
    tolerance = 6 * math.sqrt((2 + 1 / (n * q * (1 - q))) / DRAWS)
    off = abs(float(drawn.mean()) - q) * math.sqrt(DRAWS * n / (q * (1 - q)))
    passed = bool(low <= counts.min() and counts.max() <= high) and abs(spread - 1) < tolerance and off < 6
    said = f"share {drawn.mean():.5f} of q = {q:.5f}; batch sizes vary by {spread:.3f} of n q (1-q)"
    return Check("Poisson sampling with probability q", passed, said)


CHECKS: tuple[Callable[[Audited], Check], ...] = (noise_size, clipping, addition, freshness, sampling)


def check(audited: Audited) -> list[Check]:
    """All of them; one that breaks has failed."""
    return [attempt(one, audited) for one in CHECKS]


def attempt(one: Callable[[Audited], Check], audited: Audited) -> Check:
    """A check, which fails when it cannot be made."""
    try:
        return one(audited)
    except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError) as error:
        return Check(one.__name__.replace("_", " "), False, f"broke: {type(error).__name__}: {error}")
