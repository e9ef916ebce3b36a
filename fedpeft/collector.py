"""Python's collector of cycles, held back while libraries load.

torch, Transformers and PEFT make objects by the million and hardly a cycle among them, and the collector looks through all of them
again and again: a quarter of the time that they take to import, and some of every second afterwards. They stay for as long as
the process does, so that they need not be looked at.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back() -> Iterator[None]:
    """No collection inside the block, or inside the function that it decorates; a collector that was off stays off.

    What is there after the first block is not looked at any more: wrap what loads libraries, and no models.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            _leave_alone()
            gc.enable()


@functools.cache
def _leave_alone() -> None:
    gc.freeze()
