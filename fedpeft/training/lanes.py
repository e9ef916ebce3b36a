"""Lanes: on a CPU several passes go through the model side by side, each in a thread of its own.

Threads that share one product have nothing to do between the products: norms, sums, small products and Python run on one of
them. Passes do not see each other, so each lane takes some of a step's passes, forward and backward, and adds what it finds to
gradients of its own; where a step is over, these are summed. Which lane takes what follows from the plan alone, and so does the order
of every sum: a repeated run ends at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from fedpeft.training import memory

T = TypeVar("T")


class Lanes(Generic[T]):
    """Threads for as long as `with Lanes(device) as lanes`; none where one is enough."""

    def __init__(self, device: str) -> None:
        self.count = memory.lanes(device)

    def __enter__(self) -> Lanes[T]:
        import torch

        self._threads = torch.get_num_threads()  # of the processor, for a product
        self._pool = ThreadPoolExecutor(self.count, "lane") if self.count > 1 else None
        return self

    def __exit__(self, *reason: object) -> None:
        import torch

        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)  # threads to come take over what was set last

    def run(self, shares: Sequence[Sequence[T]], work: Callable[[T, int], None]) -> None:
        """`work(item, lane)` for every item of each lane's share, in order; what a lane raises is raised here when all have ended.

        A single share is worked off in the calling thread, with all of the processor.
        """
        if self._pool is None or len(shares) == 1:
            for lane, share in enumerate(shares):
                for item in share:
                    work(item, lane)
            return
        ended = [self._pool.submit(self._lane, share, lane, work) for lane, share in enumerate(shares)]
        wait(ended)
        for future in ended:
            future.result()

    def _lane(self, share: Sequence[T], lane: int, work: Callable[[T, int], None]) -> None:
        import torch

        torch.set_num_threads(max(1, self._threads // self.count))  # of this thread
        for item in share:
            work(item, lane)
