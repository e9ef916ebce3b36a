"""What an engine is given and gives back: one client's turn in a round."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedpeft import seeds
from fedpeft.config import Config
from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Indices
from fedpeft.records import Arrays


@dataclass(frozen=True)
class Job:
    """One client's training in one round."""

    client: int
    round: int
    start: Arrays  # what training starts from: every tensor of the adapter and head
    names: tuple[str, ...]  # those that train
    data: Encoded
    proximal: float = 0.0  # mu of the pull towards `start`


@dataclass(frozen=True)
class Trained:
    """What came of a job."""

    arrays: Arrays  # the trained tensors
    loss: float  # mean over the steps, each before its step
    steps: int
    seconds: float


def local_steps(config: Config, examples: int) -> int:
    """Optimiser steps of a client with so many examples in one round."""
    return math.ceil(_local_batches(config, examples) / config.training.gradient_accumulation_steps)


def _local_batches(config: Config, examples: int) -> int:
    training = config.training
    if training.max_steps is not None:
        return training.max_steps * training.gradient_accumulation_steps
    assert training.num_train_epochs is not None
    return max(1, math.ceil(training.num_train_epochs * math.ceil(examples / training.per_device_train_batch_size)))


def batches(config: Config, job: Job) -> list[list[Indices]]:
    """The examples of every step [steps][accumulation][batch]: passes over fresh random orders, the last batch of a pass may be short."""
    generator = seeds.generator(config.seed, "batches", job.round, job.client)
    size, accumulation = config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps
    wanted = _local_batches(config, len(job.data))
    dealt: list[Indices] = []
    while len(dealt) < wanted:
        order = generator.permutation(len(job.data))
        dealt.extend(np.split(order, range(size, len(order), size)))
    return [dealt[step : min(step + accumulation, wanted)] for step in range(0, wanted, accumulation)]
