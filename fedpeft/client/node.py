"""What one client owns: its examples, which never leave this process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeft import seeds
from fedpeft.data.encoded import Encoded


@dataclass(frozen=True)
class Node:
    """One client's data."""

    client: int
    train: Encoded
    validation: Encoded | None = None

    @classmethod
    def split(cls, client: int, examples: Encoded, validation_fraction: float, seed: int) -> Node:
        """A client that keeps `validation_fraction` of its examples, never all, for its own evaluation."""
        held = min(round(validation_fraction * len(examples)), len(examples) - 1)
        if not held:
            return cls(client, examples)
        order = seeds.generator(seed, "validation", client=client).permutation(len(examples))
        return cls(client, examples.take(np.sort(order[held:])), examples.take(np.sort(order[:held])))
