"""What a history of noisy releases costs: epsilon at a delta, composed over the whole run.

A release is `steps` steps of the Poisson-subsampled Gaussian mechanism: every record takes part with probability q, noise is
N(0, (sigma C)^2) on a sum of records clipped to C. Neighbours differ by one record added or removed. Opacus does the
numerics: PRV (Gopi et al. 2021, arXiv:2106.02848) is reported, RDP (Mironov et al. 2019, arXiv:1908.10530) is the quick upper
bound beside it. GDP's central limit is not used: it understates.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64), *range(64, 1025, 16))
"""Of RDP: beyond Opacus's 63, where small epsilons need larger ones."""

EPSILON_ERROR = 0.01  # of PRV, added to what it reports; a tenth of it where epsilon is below SMALL
SMALL = 0.1
LARGE = 1e4  # of RDP's bound: beyond it PRV's grid, which grows with it, would fill the memory; nobody is protected there
LARGEST_SIGMA = 1e4


@dataclass(frozen=True)
class Release:
    """`steps` equal steps."""

    sigma: float  # noise multiplier: standard deviation over the clipping norm
    q: float  # probability of a record to take part in a step
    steps: int


History = tuple[Release, ...]


def grouped(history: Iterable[Release]) -> History:
    """The same history with equal steps put together: composition does not depend on the order."""
    counts: dict[tuple[float, float], int] = {}
    for release in history:
        counts[release.sigma, release.q] = counts.get((release.sigma, release.q), 0) + release.steps
    return tuple(Release(sigma, q, steps) for (sigma, q), steps in sorted(counts.items()) if steps)


def epsilon(history: Iterable[Release], delta: float) -> float:
    """An upper bound on epsilon at `delta`: the lower of PRV's and RDP's, both being bounds. Nothing released costs nothing."""
    return _epsilon(grouped(history), delta)


@functools.lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float) -> float:
    bound = _rdp(history, delta)
    if not history or bound > LARGE:
        return bound
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of logarithms of zero, which are meant
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(release.sigma, release.q, release.steps) for release in history]
        try:
            found = max(0.0, float(accountant.get_epsilon(delta, eps_error=EPSILON_ERROR if bound > SMALL else EPSILON_ERROR / 10)))
        except (ValueError, OverflowError, RuntimeError):  # beyond what PRV can discretise: RDP's bound stands
            return bound
    return min(bound, found) if math.isfinite(found) else bound


def upper_bound(history: Iterable[Release], delta: float) -> float:
    """RDP's bound on epsilon: in microseconds, and never below `epsilon`."""
    return _rdp(grouped(history), delta)


@functools.lru_cache(maxsize=65536)
def _rdp(history: History, delta: float) -> float:
    if not history:
        return 0.0
    if any(release.sigma <= 0 for release in history):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimum at the largest order is a bound all the same
        from opacus.accountants.analysis import rdp

        spent = sum(
            rdp.compute_rdp(q=release.q, noise_multiplier=release.sigma, steps=release.steps, orders=list(ORDERS)) for release in history
        )
        return max(0.0, float(rdp.get_privacy_spent(orders=list(ORDERS), rdp=spent, delta=delta)[0]))


def affordable(history: Iterable[Release], delta: float, budget: float) -> bool:
    """Epsilon of `history` is within `budget`; PRV is asked only where RDP does not already say so."""
    history = grouped(history)
    return _rdp(history, delta) <= budget or _epsilon(history, delta) <= budget


@functools.lru_cache(maxsize=4096)
def sigma_for(target: float, delta: float, q: float, steps: int, spent: History = ()) -> float | None:
    """The smallest noise multiplier, to half a percent of epsilon, with which `steps` more steps stay within `target`.

    None when what is `spent` already leaves no room. RDP's answer is found first; from there PRV's by false position.
    """

    def over(sigma: float, bound: Callable[[Iterable[Release], float], float]) -> float:
        """log(epsilon / target), above zero where sigma is too small."""
        return math.log(max(bound((*spent, Release(sigma, q, steps)), delta), math.ulp(0.0)) / target)

    if not affordable(spent, delta, target):
        return None
    low, high = 0.0, 1.0
    while over(high, upper_bound) > 0:
        low, high = high, 2 * high
        if high > LARGEST_SIGMA:
            return None
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle, upper_bound) > 0 else (low, middle)
    fits, miss = high, over(high, epsilon)
    low = high
    while (above := over(low := 0.8 * low, epsilon)) <= 0:
        fits, miss = low, above
    for _ in range(8):
        if miss > -5e-3:
            break
        tried = math.exp(math.log(low) + (math.log(fits) - math.log(low)) * above / (above - miss) + 1e-3)
        found = over(tried, epsilon)
        if found <= 0:
            fits, miss = tried, found
        else:
            low, above = tried, found
    return fits
