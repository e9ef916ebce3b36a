"""Who takes part in a round: a uniform sample without replacement, drawn from (seed, round) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeft import seeds


def choose(available: Sequence[int], fraction: float, minimum: int, seed: int, round: int) -> list[int]:
    """The clients asked in `round`, sorted: ceil(fraction * available) of them, at least `minimum`, at most all."""
    wanted = min(len(available), max(minimum, math.ceil(fraction * len(available) - 1e-9)))
    drawn = seeds.generator(seed, "sampling", round).choice(sorted(available), wanted, replace=False)
    return sorted(int(client) for client in drawn)
