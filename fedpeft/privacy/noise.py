"""Where noise and sampling get their randomness: a ChaCha20 keystream under a key from the operating system, or, for tests
and repeatable studies alone, a seeded generator that promises nothing.

A Gaussian is the sum of four, halved (Holohan and Braghin 2021, arXiv:2107.10138): the low bits of a single floating-point
Gaussian can give away what was added to.
"""

from __future__ import annotations

import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft import seeds

AT_ONCE = 8192  # numbers, whose uniform ones stay in a processor's cache


class Noise(Protocol):
    """A source of uniform numbers in (0, 1)."""

    secure: bool

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` numbers."""

    def seed(self) -> int:
        """Of a generator whose numbers nobody else may know: dropout's masks."""


class Secure:
    """ChaCha20 with a fresh key: nobody can draw it again, nor can a restarted process."""

    secure = True

    def __init__(self) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        self._stream = Cipher(algorithms.ChaCha20(os.urandom(32), os.urandom(16)), mode=None).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """53 random bits each, never 0 and never 1."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def seed(self) -> int:
        """63 bits from the operating system, others each time."""
        return int.from_bytes(os.urandom(8), "little") >> 1


class Insecure:
    """A generator that the run's seed determines, which whoever knows the seed can take off again."""

    secure = False

    def __init__(self, seed: int, round: int, client: int) -> None:
        self._generator = seeds.generator(seed, "insecure noise", round, client)
        self._seed = seeds.derive(seed, "insecure dropout", round, client)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """From the seeded generator."""
        return self._generator.uniform(np.finfo(np.float64).tiny, 1.0, count)

    def seed(self) -> int:
        """From the run's seed, always the same."""
        return self._seed


def gaussian(source: Noise, count: int) -> NDArray[np.float64]:
    """`count` independent N(0, 1): the sum of four Box-Muller Gaussians, halved.

    A pair R cos(t) + R sin(t) with R = sqrt(-2 log u) is sqrt(2) R cos(t - pi / 4), and t is uniform: the halved sum of two
    pairs is sqrt(-log u) cos(t) + sqrt(-log u') cos(t'), of the same four uniform numbers. Torch has the faster cosine.
    """
    import torch

    whole = np.empty(count)
    for first in range(0, count, AT_ONCE):
        n = min(AT_ONCE, count - first)
        u = torch.from_numpy(source.uniform(4 * n)).reshape(2, 2, n)
        terms = u[0].log().neg_().sqrt_().mul_((u[1] * (2 * np.pi)).cos_())
        whole[first : first + n] = (terms[0] + terms[1]).numpy()
    return whole


def poisson(source: Noise, examples: int, q: float) -> NDArray[np.int64]:
    """The rows of a batch, each of `examples` taken independently with probability `q`; it may be empty."""
    return np.flatnonzero(source.uniform(examples) < q)
