"""Lanes: on a CPU several passes go through the model side by side, each in a thread of its own.

Threads that share one product have nothing to do between the products: norms, sums, small products and Python run on one of
them. Passes do not see each other, so each lane takes some of a step's passes, forward and backward, and adds what it finds to
gradients of its own; where a step is over, these are summed. Which lane takes what follows from the plan alone, and so does the order
of every sum: a repeated run ends at the same bits (but for states that are kept: prefix.py).

A model that remembers something from one forward to the next, in its modules, would meet another lane's. Such a one is found by looking
whether a forward has changed it, and has one lane.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Generic, TypeVar

from fedpeft.training import memory

T = TypeVar("T")


class Lanes(Generic[T]):
    """Threads for as long as `with Lanes(device) as lanes`; none where one is enough."""

    def __init__(self, device: str) -> None:
        self.count = memory.lanes(device)
        self._stop = threading.Event()

    def __enter__(self) -> Lanes[T]:
        import torch

        self._threads = torch.get_num_threads()  # of the processor
        self._pool = ThreadPoolExecutor(self.count, "lane") if self.count > 1 else None
        return self

    def __exit__(self, *reason: object) -> None:
        import torch

        if self._pool is not None:
            try:
                self._stop.set()
                self._pool.shutdown()
            finally:
                torch.set_num_threads(self._threads)  # threads to come take over what was set last

    def run(self, shares: Sequence[Sequence[T]], work: Callable[[T, int], None]) -> None:
        """`work(item, lane)` for every item of each lane's share, in order.

        What a lane raises is raised here, the first lane's first, when all have ended; they go no further than their items under way. A
        single share is worked off in the calling thread, with all of the processor.
        """
        if self._pool is None or len(shares) == 1:
            for lane, share in enumerate(shares):
                for item in share:
                    work(item, lane)
            return
        self._stop.clear()
        futures = [self._pool.submit(self._lane, share, lane, len(shares), work) for lane, share in enumerate(shares)]
        try:
            wait(futures)
            while futures:
                futures.pop(0).result()
        finally:
            self._stop.set()
            futures.clear()  # an error knows this frame: if the frame knew the error, a whole cohort would stay alive

    def _lane(self, share: Sequence[T], lane: int, lanes: int, work: Callable[[T, int], None]) -> None:
        import torch

        torch.set_num_threads(self._threads // lanes + (lane < self._threads % lanes) or 1)  # of this thread
        try:
            for item in share:
                if self._stop.is_set():
                    return
                work(item, lane)
        except BaseException:
            self._stop.set()
            raise


Remembered = list[tuple[Any, dict[str, Any], dict[str, tuple[Any, int]]]]


def remembered(model: Any) -> Remembered:
    """What the modules of `model` hold, to be compared with later."""
    return [(module, dict(vars(module)), _buffers(module)) for module in model.modules()]


def forgetful(before: Remembered) -> bool:
    """Whether all that was `remembered` is as it was: the same objects, and nothing written into a buffer."""
    for module, held, buffers in before:
        now = vars(module)
        if now.keys() != held.keys() or any(now[name] is not value for name, value in held.items()):
            return False
        tensors = _buffers(module)
        if tensors.keys() != buffers.keys() or any(tensors[name][1] != version for name, (_, version) in buffers.items()):
            return False
        if any(tensors[name][0] is not tensor for name, (tensor, _) in buffers.items()):
            return False
    return True


def _buffers(module: Any) -> dict[str, tuple[Any, int]]:
    return {name: (tensor, -1 if tensor is None else tensor._version) for name, tensor in module._buffers.items()}
