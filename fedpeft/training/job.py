"""What an engine is given and gives back: one client's turn in a round."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fedpeft import seeds
from fedpeft.config import Config
from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Indices
from fedpeft.lookup import find
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.records import Arrays, Failure
from fedpeft.training import schedules
from fedpeft.training.passes import length
from fedpeft.training.rules import Rules

BREAKS = (RuntimeError, ValueError, IndexError, ArithmeticError)  # what torch and NumPy raise, out of memory included


@dataclass(frozen=True)
class Job:
    """One client's training in one round."""

    client: int
    round: int
    start: Arrays  # what training starts from: every tensor of the adapter and head
    names: tuple[str, ...]  # those that train
    data: Encoded
    proximal: float = 0.0  # mu of the pull towards `start`
    tail: tuple[float, float] = (0.0, 1.0)  # (lambda, g) of a penalty lambda ||A[g r:]|| ||B[:, g r:]||
    private: Mechanism | None = None  # how each step is made differentially private
    drift: Arrays = field(default_factory=dict)  # added to the gradients of the tensors it names, in every step
    rules: Rules = field(default_factory=Rules)  # what the adapter wants of single tensors


@dataclass(frozen=True)
class Trained:
    """What came of a job."""

    arrays: Arrays  # the trained tensors
    loss: float | None  # mean over the steps, each before its step; None where saying it would give away more than the budget
    steps: int
    seconds: float
    fell_back: bool = False  # trained by the reference engine, since the engine asked for does not cover it


def broken(job: Job, error: Exception) -> Failure:
    """What is said of a job whose training raised `error`; under privacy no more than its kind, since the words may hold data."""
    return Failure(job.round, job.client, f"training broke: {error if job.private is None else type(error).__name__}")


def dropout_seed(config: Config, job: Job) -> int:
    """Seed of the generator that a job's dropout masks come from.

    Under privacy it is secret. A record more moves the records behind it to other masks; only who does not know the masks, which
    are drawn alike for every row, sees the same law of what the others add, and sensitivity C.
    """
    if job.private is not None and not job.private.does_nothing:
        return job.private.noise.seed()
    return seeds.derive(config.seed, "dropout", job.round, job.client)


def local_steps(config: Config, examples: int) -> int:
    """Optimiser steps of a client with so many examples in one round."""
    return math.ceil(_local_batches(config, examples) / config.training.gradient_accumulation_steps)


def rates(config: Config, examples: int, round: int) -> list[float]:
    """The learning rate of every step of a client with so many examples in `round`: one schedule over the whole run."""
    training, steps = config.training, local_steps(config, examples)
    schedule, before, total = find("schedule", training.lr_scheduler_type), (round - 1) * steps, config.strategy.num_rounds * steps
    return [training.learning_rate * schedules.factor(schedule, before + step, total, training.warmup_ratio) for step in range(steps)]


def step_sizes(config: Config, examples: int, round: int) -> float:
    """The sum of `rates`: with plain SGD, how far a unit gradient moves the client in `round`."""
    return sum(rates(config, examples, round))


def _local_batches(config: Config, examples: int) -> int:
    training = config.training
    if training.max_steps is not None:
        return training.max_steps * training.gradient_accumulation_steps
    assert training.num_train_epochs is not None
    return max(1, math.ceil(training.num_train_epochs * math.ceil(examples / training.per_device_train_batch_size)))


def batches(config: Config, job: Job) -> list[list[Indices]]:
    """The examples of every step [steps][accumulation][batch]: passes over fresh random orders, the last batch of a pass may be short.

    With length buckets those of a step are dealt to its batches by length; which examples a step holds stays as it was.
    """
    generator = seeds.generator(config.seed, "batches", job.round, job.client)
    size, accumulation = config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps
    wanted = _local_batches(config, len(job.data))
    dealt: list[Indices] = []
    while len(dealt) < wanted:
        order = generator.permutation(len(job.data))
        dealt.extend(np.split(order, range(size, len(order), size)))
    steps = [dealt[step : min(step + accumulation, wanted)] for step in range(0, wanted, accumulation)]
    return [by_length(config, job.data, parts) for parts in steps]


def by_length(config: Config, data: Encoded, parts: list[Indices]) -> list[Indices]:
    """The rows of one step in `training.length_buckets` batches for each of `parts`, so that rows of like length stand together.

    The gradient of a step is a mean over all of them: its value does not depend on how they are dealt.
    """
    buckets = config.training.length_buckets
    if buckets == 1 or not parts:
        return parts
    rows = np.concatenate(parts)
    rows = rows[np.argsort([length(data, int(row)) for row in rows], kind="stable")]
    return [part for part in np.array_split(rows, buckets * len(parts)) if len(part)]
