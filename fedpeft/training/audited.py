"""The private step of the clients as an audit sees it: the engine, the guard and the sampler that a run uses, one client's data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.data.encoded import Encoded
from fedpeft.lookup import find
from fedpeft.privacy.conformance import Vector
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.noise import Secure
from fedpeft.records import Arrays, Failure
from fedpeft.training import private
from fedpeft.training.job import Job

IN, OUT, HALF = 0.25, 0.75, 0.5
"""What a coin shows for who takes part and who does not, and the probability that tells them apart."""

BATCH = 0.01  # the denominator of a step that is looked at: steps far beyond the rounding of what they are added to


class Chosen:
    """Randomness whose first draw decides who takes part, and whose further draws are noise."""

    secure = False

    def __init__(self, chosen: Sequence[int]) -> None:
        self._chosen: Sequence[int] | None = chosen
        self._noise = Secure()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Coins, then noise."""
        if self._chosen is None:
            return self._noise.uniform(count)
        coins = np.full(count, OUT)
        coins[list(self._chosen)] = IN
        self._chosen = None
        return coins

    def seed(self) -> int:
        """Of no dropout: there is none while a step is looked at."""
        return 0


@dataclass
class ExampleStep:
    """One client's examples, under the mechanism that its guard hands out."""

    config: Config
    adapted: Adapted
    task: Any
    data: Encoded
    start: Arrays
    guard: Callable[[], Guard]  # as at the start of a run, or of one that is resumed

    def __post_init__(self) -> None:
        guard = self.guard()
        self.n, self.q, self.sigma, self.C = len(self.data), guard.plan.q, guard.plan.sigma, guard.C
        resting = self.adapted.adapter.resting(self.adapted.layout(), self.start)
        self.names = tuple(name for name in self.adapted.trained if name not in resting)
        self._sampled = guard.begin(1)

    def release(self, chosen: Sequence[int], sigma: float, C: float) -> Vector:
        """One step of the run's own engine, by plain descent at rate 1, so that the way it goes is what was released."""
        C = min(C, 1e6)  # an infinite C beside sigma 0 would not be a private step any more
        return self._went(Mechanism(sigma, C, HALF, BATCH, Chosen(chosen)))

    def noises(self) -> list[tuple[str, Vector]]:
        """Steps of one round, of the next, and of the first played again by a client that was started anew."""
        found = []
        guard = self.guard()
        for what, mechanism in (("round 1", guard.begin(1)), ("round 2", guard.begin(2)), ("round 1 again", self.guard().begin(1))):
            empty = replace(mechanism, q=0.0)
            found += [(f"{what}, step {step}", self._went(empty)) for step in (1, 2)]
        return found

    def draw(self) -> list[int]:
        """As the engines draw."""
        drawn = private.parts(self.job(self._sampled, self.data), self._sampled, self.n)
        return [int(row) for part in drawn for row in part]

    def job(self, mechanism: Mechanism, data: Encoded) -> Job:
        """A turn on `data`."""
        return Job(0, 1, self.start, self.names, data, private=mechanism)

    def _went(self, mechanism: Mechanism) -> Vector:
        descent = {"optimizer": "sgd", "learning_rate": 1.0, "max_steps": 1, "num_train_epochs": None, "lr_scheduler_type": "constant"}
        plain = {**descent, "weight_decay": 0.0, "warmup_ratio": 0.0, "gradient_accumulation_steps": 1}
        config = self.config.model_copy(update={"training": self.config.training.model_copy(update=plain)})
        with _without_dropout(self.adapted.model):
            (trained,) = find("engine", config.training.engine)(self.adapted, self.task, config, [self.job(mechanism, self.data)])
        if isinstance(trained, Failure):
            raise RuntimeError(trained.reason)
        way = [(self.start[name].astype(np.float64) - trained.arrays[name]).ravel() for name in self.names]
        return np.concatenate(way) * mechanism.batch


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    """Contributions can be compared only where masks do not differ from batch to batch."""
    import torch

    modules = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    rates = [module.p for module in modules]
    try:
        for module in modules:
            module.p = 0.0
        yield
    finally:
        for module, rate in zip(modules, rates, strict=True):
            module.p = rate
