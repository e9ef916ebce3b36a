"""What one client owns: its examples, which never leave this process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft import seeds
from fedpeft.base import Base
from fedpeft.data.encoded import Encoded
from fedpeft.sections import DataSection
from fedpeft.tasks.task import Task


@dataclass(frozen=True)
class Node:
    """One client's data."""

    client: int
    train: Encoded
    validation: Encoded | None = None

    @classmethod
    def split(cls, client: int, examples: Encoded, data: DataSection, seed: int, task: Task, base: Base) -> Node:
        """A client that keeps `validation_fraction` of its examples, never all, for its own evaluation, and trains on the
        others as its task arranges them."""
        held = min(round(data.validation_fraction * len(examples)), len(examples) - 1)
        if not held:
            return cls(client, task.arrange(examples, base, data))
        order = seeds.generator(seed, "validation", client=client).permutation(len(examples))
        train = task.arrange(examples.take(np.sort(order[held:])), base, data)
        return cls(client, train, examples.take(np.sort(order[:held])))
