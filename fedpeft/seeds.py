"""Every generator of a run, derived from (run seed, purpose, round, client) and from nothing else.

Who trains first, on which machine, or whether a run was resumed cannot change a number: two generators are equal
exactly when the four are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """A 63-bit seed from the four facts that a generator may depend on."""
    words = f"{seed}/{purpose}/{round}/{client}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """A fresh generator that only the four facts determine."""
    return np.random.default_rng(derive(seed, purpose, round, client))


@contextmanager
def torch_seed(seed: int, device: str = "cpu") -> Iterator[None]:
    """Seed torch's own generators (dropout, new layers) inside the block and restore them after it."""
    import torch

    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
