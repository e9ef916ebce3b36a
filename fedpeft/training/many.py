"""The fast engine: all clients of a cohort in one pass over the shared base, each exactly as if it trained alone.

    L = sum over clients c of L_c,   L_c the mean over the records of c's step:   dL / d theta_c = dL_c / d theta_c

Here jobs are told apart by what they train, dealt into cohorts that fit into memory (cohort.py trains one), and what breaks
is narrowed down to who is to blame. A client's numbers do not depend on who shares its passes, beyond the rounding of float32.

The reference is `one`; what this engine cannot do exactly as there is done there, and said: once in the log, and in the
report of every round.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.lookup import TABLES
from fedpeft.records import BESIDE, Failure
from fedpeft.training import memory, one
from fedpeft.training.cohort import CohortTraining, Setting
from fedpeft.training.job import BREAKS, Job, Trained, broken
from fedpeft.training.masks import UnsuitedError
from fedpeft.training.passes import length
from fedpeft.training.stacked_layers import obstacle

log = logging.getLogger(__name__)


def train(adapted: Adapted, task: Any, config: Config, jobs: Sequence[Job]) -> list[Trained | Failure]:
    """Train every job from its own start, many in one pass. A client whose training breaks is a Failure; the others go on."""
    reason = obstacle(adapted)
    if config.training.optimizer not in TABLES["stacked_optimizer"]:
        reason = f"the optimizer {config.training.optimizer} has no form for many clients"
    if reason is None:
        try:
            with seeds.torch_seed(config.seed, adapted.base.device):  # whatever is drawn here, nobody else notices
                return _in_cohorts(Setting(adapted, task, config), jobs)
        except UnsuitedError as error:
            reason = str(error)
    _say(reason)
    ended = one.train(adapted, task, config, jobs)
    return [replace(trained, fell_back=True) if isinstance(trained, Trained) else trained for trained in ended]


@functools.cache
def _say(reason: str) -> None:
    log.warning("engine many: one client at a time, since %s", reason)


def _in_cohorts(setting: Setting, jobs: Sequence[Job]) -> list[Trained | Failure]:
    """Jobs that train the same tensors, so many at once as the memory allows."""
    device = setting.adapted.base.device
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, job in enumerate(jobs):
        alike.setdefault(job.names, []).append(number)
    ended: dict[int, Trained | Failure] = {}
    for numbers in alike.values():
        size = memory.clients_at_once(setting.config.training, device, max(_numbers(jobs[number], device) for number in numbers))
        if setting.config.training.clients_at_once is None:
            size = min(size, memory.clients_that_pay(device, _tokens(setting.config, [jobs[number] for number in numbers])) or size)
            size = math.ceil(len(numbers) / math.ceil(len(numbers) / size))  # cohorts of like size
        for first in range(0, len(numbers), size):
            seated = numbers[first : first + size]
            ended |= zip(seated, _attempt(setting, [jobs[number] for number in seated], 1), strict=True)
    return [ended[number] for number in range(len(jobs))]


def _numbers(job: Job, device: str) -> int:
    """Numbers that train; of the others one copy stands at most."""
    sizes = {name: array.size for name, array in job.start.items() if not name.startswith(BESIDE)}
    trained = sum(sizes[name] for name in job.names)
    return trained + (sum(sizes.values()) - trained) // memory.copies(device)


def _tokens(config: Config, jobs: Sequence[Job]) -> float:
    """Tokens of a batch, on average."""
    lengths = [length(job.data, row) for job in jobs for row in range(len(job.data))]
    return float(np.mean(lengths or [0])) * config.training.per_device_train_batch_size


def _attempt(setting: Setting, jobs: Sequence[Job], divisor: int) -> list[Trained | Failure]:
    """Train a cohort; when it breaks, each half of it alone, down to the client that is to blame."""
    import torch

    try:
        return CohortTraining(setting, jobs, divisor).run()
    except BREAKS as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            if divisor > 1 and len(jobs) == 1:
                return [broken(jobs[0], error)]
            divisor *= 2
            _ran_out(len(jobs))
        elif len(jobs) == 1:
            return [broken(jobs[0], error)]
    middle = (len(jobs) + 1) // 2
    return [trained for half in (jobs[:middle], jobs[middle:]) if half for trained in _attempt(setting, half, divisor)]


@functools.cache
def _ran_out(clients: int) -> None:
    log.warning("engine many: out of GPU memory with %d clients at once; half of them, in passes of half the size", clients)
