"""Learning-rate schedules over the whole run: `step` counts a client's steps from round 1, so that rounds join smoothly.

Each returns the factor on the peak rate for `step` in 0..total-1. Warm-up, the same for all, is in `factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]  # progress after warm-up in [0, 1) -> factor


def constant(progress: float) -> float:
    """Stays at the peak."""
    return 1.0


def linear(progress: float) -> float:
    """Falls in a straight line to zero."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Falls along half a cosine to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def factor(schedule: Schedule, step: int, total: int, warmup_ratio: float) -> float:
    """The factor at `step`: a linear rise over the first `warmup_ratio` of `total` steps, then the schedule."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    return schedule(min(1.0, (step - warmup) / max(1, total - warmup)))
