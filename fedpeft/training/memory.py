"""How much engine `many` takes on at once, from a budget of memory.

Half of the budget is for what each client of a cohort has: copies of its numbers (start, values, two moments, and gradients for
each lane: lanes.py). A quarter is for the activations of a pass: what the backward pass needs is counted, tensor by tensor, while one
row goes through the model, and a pass may hold as many tokens as fit. A quarter is for dropout masks, which wait for the
passes that need them. The plan depends on the machine, the model and the jobs alone, so that a repeated run is cut alike.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedpeft.sections import TrainingSection

if TYPE_CHECKING:
    import torch

MOST_LANES = 8  # threads with passes of their own: what Python does between the products, one thread does at a time
ON_CPU = 512  # tokens of a pass, a thread: more are hardly faster, and take memory
OVERHEAD_ON_CPU, OVERHEAD = 64, 1024  # of a pass, in tokens: a small model's on a CPU (measured), a large one's on a GPU (reckoned)
PASSES = 16  # that rows are sorted into by length: more make them hardly more alike


def budget(training: TrainingSection, device: str) -> float:
    """Bytes that the engine plans for."""
    import torch

    if training.memory_gb is not None:
        return training.memory_gb * 1e9
    if device.startswith("cuda"):
        return 0.8 * (torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device))
    return 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def lanes(device: str) -> int:
    """How many passes go through the model side by side, each on its share of the processor's threads."""
    import torch

    return min(MOST_LANES, torch.get_num_threads()) if _is_cpu(device) else 1


def copies(device: str) -> int:
    """Of every client's numbers: start, values, two moments, and gradients for each lane."""
    return 4 + lanes(device)


def clients_at_once(training: TrainingSection, device: str, numbers: int) -> int:
    """Clients of a cohort when each has so many numbers."""
    if training.clients_at_once is not None:
        return training.clients_at_once
    return max(1, int(budget(training, device) / 2 / (copies(device) * 4 * numbers)))


def clients_that_pay(device: str, tokens: float) -> int | None:
    """Clients of a cohort beyond which more are no faster, when a batch of each has so many tokens; None on a GPU, which knows no end."""
    import torch

    return max(1, math.ceil(PASSES * ON_CPU * torch.get_num_threads() / max(1.0, tokens))) if _is_cpu(device) else None


def tokens_at_once(training: TrainingSection, device: str, bytes_a_token: float) -> int:
    """Tokens whose activations may stand in memory, padding included; those of all lanes."""
    return int(budget(training, device) / 4 / bytes_a_token)


def tokens_of_a_pass(device: str, lanes: int, fit: int) -> int:
    """Tokens of a pass of one of so many lanes, when `fit` are all that may stand in memory."""
    import torch

    return min(fit, ON_CPU * torch.get_num_threads()) // lanes if _is_cpu(device) else fit // lanes


def overhead(device: str) -> int:
    """As many tokens cost what a pass costs beside its tokens."""
    return OVERHEAD_ON_CPU if _is_cpu(device) else OVERHEAD


def _is_cpu(device: str) -> bool:
    return device.partition(":")[0] == "cpu"


def tokens_with_masks(training: TrainingSection, device: str, bytes_a_token: float, tokens: int) -> int:
    """Tokens whose masks may stand in memory while their rows are dealt into passes; those under way at once have `tokens`."""
    fit = int(budget(training, device) / 4 / max(1.0, bytes_a_token))
    return max(tokens, min(fit, PASSES * tokens))


def rows_at_once(training: TrainingSection, device: str, numbers: int) -> int:
    """Rows, of all lanes, each of which has a gradient of so many numbers for itself: what is gathered, found, and clipped."""
    return int(budget(training, device) / 4 / (3 * 4 * numbers))


@contextmanager
def counted(standing: Iterable[torch.Tensor]) -> Iterator[Callable[[], int]]:
    """Gives a function that says how many bytes were kept for the backward pass inside the block, without those of `standing`."""
    import torch

    ours = {tensor.untyped_storage().data_ptr() for tensor in standing}
    kept: dict[int, int] = {}  # by storage, which several tensors may share

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(kept.values())
