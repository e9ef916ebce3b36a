"""A second opinion on a ledger: its lines read anew, its chain followed anew, its epsilon computed in another way.

The accountants of accounting.py go by Renyi moments and by Opacus's PRV. Here the privacy loss of one step, log P/Q of the two
outputs that neighbours lead to, is put on a grid and convolved over all steps by FFT:

    remove:  P = (1-q) N(0, s^2) + q N(1, s^2),  Q = N(0, s^2);     add: P and Q changed about
    delta(epsilon) = sum over losses l > epsilon of p(l) (1 - e^(epsilon - l)),   the worse of the two

Nothing is shared with those but the definition (Koskela et al. 2020, arXiv:1906.03049). The grid makes it an estimate, good to
about a hundredth, and no bound.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedpeft.privacy.accounting import Release

CELLS = 2**17  # of the output of one step
LOSSES = 2**18  # of the grid of losses
TAIL = 12.0  # standard deviations of the output that are looked at


def read(path: pathlib.Path) -> tuple[list[Release], int | None]:
    """(releases, number of the first line that does not follow from those before it, or None) of a ledger's file."""
    previous = "0" * 64
    found: list[Release] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        entry = json.loads(line)
        if entry["prev"] != previous:
            return found, number
        previous = hashlib.sha256(line).hexdigest()
        found.append(Release(entry["sigma"], entry["q"], entry["steps"]))
    return found, None


def epsilon(history: Iterable[Release], delta: float, largest: float = 40.0) -> float:
    """Epsilon at `delta`, looked for up to `largest`; infinity beyond."""
    releases = [release for release in history if release.steps]
    if not releases:
        return 0.0
    if any(release.sigma <= 0 for release in releases):
        return float("inf")
    return max(_one_way(releases, delta, 2 * largest, removed) for removed in (True, False))


def _one_way(history: list[Release], delta: float, span: float, removed: bool) -> float:
    grid = np.linspace(-span, span, LOSSES, endpoint=False)
    whole = np.ones(LOSSES // 2 + 1, np.complex128)
    for release in history:
        whole *= np.fft.rfft(np.fft.ifftshift(_losses(release, grid, removed))) ** release.steps
    masses = np.clip(np.fft.fftshift(np.fft.irfft(whole, LOSSES)), 0.0, None)

    def spent(epsilon: float) -> float:
        above = grid > epsilon
        return float((masses[above] * -np.expm1(epsilon - grid[above])).sum())

    low, high = 0.0, span / 2
    if spent(high) > delta:
        return float("inf")
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def _losses(release: Release, grid: NDArray[np.float64], removed: bool) -> NDArray[np.float64]:
    """The distribution of one step's loss on the grid, each cell's mass split over two points so that its mean stays."""
    from scipy.stats import norm

    s, q = release.sigma, release.q
    edges = np.linspace(-TAIL * s, 1 + TAIL * s, CELLS + 1)
    x = (edges[1:] + edges[:-1]) / 2
    without, shifted = np.diff(norm.cdf(edges / s)), np.diff(norm.cdf((edges - 1) / s))
    exponent = (2 * x - 1) / (2 * s**2)  # log N(1, s^2) / N(0, s^2)
    ratio = np.logaddexp(np.log1p(-q), np.log(q) + exponent) if q < 1 else exponent
    loss, mass = (ratio, (1 - q) * without + q * shifted) if removed else (-ratio, without)
    place = (np.clip(loss, grid[0], grid[-2]) - grid[0]) / (grid[1] - grid[0])
    left = place.astype(np.int64)
    near, far = np.bincount(left, mass * (1 - (place - left)), len(grid)), np.bincount(left + 1, mass * (place - left), len(grid))
    return np.asarray(near + far, np.float64)
