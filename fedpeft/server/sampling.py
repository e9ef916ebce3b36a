"""Who takes part in a round: a uniform sample without replacement, drawn from (seed, round) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeft import seeds


def size(available: int, fraction: float, minimum: int) -> int:
    """How many of the available clients are asked: ceil(fraction * available), at least `minimum`, at most all."""
    return min(available, max(minimum, math.ceil(fraction * available - 1e-9)))


def choose(available: Sequence[int], fraction: float, minimum: int, seed: int, round: int) -> list[int]:
    """The clients asked in `round`, sorted."""
    wanted = size(len(available), fraction, minimum)
    drawn = seeds.generator(seed, "sampling", round).choice(sorted(available), wanted, replace=False)
    return sorted(int(client) for client in drawn)
