"""What one run proves about epsilon: canaries that were each in or out by a coin, and guesses which were.

Of m canaries, each put in with probability 1/2, an auditor who sees everything released guesses r and is right v times. Under
(epsilon, delta)-DP, whatever it did,

    P[v or more right] <= beta + 2 m delta max_{1 <= i <= v} P[v > W >= v - i] / i
    W ~ Binomial(r, e^epsilon / (1 + e^epsilon)),   beta = P[W >= v]

and the largest epsilon for which that is at most 1 - confidence is a lower bound. It says nothing from above: a run in which
no violation was found is not proved private. r right guesses of r prove at most `ceiling`.

Paper: Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846), theorem 5.2 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.99  # an audit that is run on every build may not cry wolf
GUESSED = 0.2  # share of the canaries that are guessed: those with the highest and the lowest scores
LARGEST = 30.0  # epsilon beyond which no bound is looked for


@dataclass(frozen=True)
class Evidence:
    """What the guesses came to."""

    canaries: int
    guesses: int
    right: int
    lower: float  # epsilon is at least this, with `confidence`
    ceiling: float  # what as many guesses could have shown at most
    confidence: float = CONFIDENCE


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """A bound on the probability of v or more right guesses out of r."""
    from scipy.stats import binom

    pmf = binom.pmf(np.arange(r + 1), r, 1 / (1 + np.exp(-epsilon)))
    beta = float(pmf[v:].sum())
    alpha = float((np.cumsum(pmf[:v][::-1]) / np.arange(1, v + 1)).max()) if v else 0.0
    return min(1.0, beta + 2 * m * delta * alpha)


def lower_bound(m: int, r: int, v: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that v right guesses out of r refute, at the given confidence; 0 when they refute none."""
    if p_value(m, r, v, 0.0, delta) > 1 - confidence:
        return 0.0
    low, high = 0.0, LARGEST
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if p_value(m, r, v, middle, delta) <= 1 - confidence else (low, middle)
    return low


def judge(scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float) -> Evidence:
    """Guess the highest scores in and the lowest out, as many as was decided beforehand."""
    m = len(scores)
    half = max(1, round(GUESSED * m / 2))
    order = np.argsort(-np.nan_to_num(scores), kind="stable")
    right = int(included[order[:half]].sum() + (~included[order[-half:]]).sum())
    return Evidence(m, 2 * half, right, lower_bound(m, 2 * half, right, delta), lower_bound(m, 2 * half, 2 * half, delta))
