"""The server's private release as an audit sees it: the curator of the run over made-up clients, since no model has a part in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.privacy.conformance import Vector
from fedpeft.privacy.curator import Curator
from fedpeft.privacy.noise import Noise, Secure
from fedpeft.privacy.one_run import Evidence, judge
from fedpeft.records import Arrays, Layout, Update

CANARIES = 500
FAR = 100.0  # times C
SHAPES = {"a.lora_A.weight": (8, 100), "a.lora_B.weight": (100, 8), "head.weight": (4, 100)}


@dataclass
class ClientRound:
    """A round of the run's curator. Clients move by very different amounts, and claim very different numbers of examples."""

    curator: Callable[[], Curator]  # as at the start of a run, or of one that is resumed

    def __post_init__(self) -> None:
        curator, drawn = self.curator(), np.random.default_rng(0)
        self.n, self.q, self.sigma, self.C = curator.plan.examples, curator.fraction, curator.sigma, curator.section.clipping_norm
        self.received = {name: drawn.normal(size=shape) for name, shape in SHAPES.items()}
        self.updates = [
            Update(1, client, {n: x + 10.0 ** (client % 3 - 1) * drawn.normal(size=x.shape) for n, x in self.received.items()}, 10**client)
            for client in range(min(self.n, 8))
        ]
        self._drawn_by = curator

    def release(self, chosen: Sequence[int], sigma: float, C: float) -> Vector:
        """A round of just these clients."""
        curator = self.curator()
        curator.sigma = sigma
        return self._went(curator, Secure(), [self.updates[client] for client in chosen], 1, C)

    def noises(self) -> list[tuple[str, Vector]]:
        """A round, the next, and the first played again by a server that was started anew."""
        curators = (("round 1", 1, self.curator()), ("round 2", 2, self.curator()), ("round 1 again", 1, self.curator()))
        return [(what, self._went(curator, curator.source(round), [], round, self.C)) for what, round, curator in curators]

    def draw(self) -> Sequence[int]:
        """As the server draws."""
        return self._drawn_by.sample(self._drawn_by.source(1) if self._drawn_by.section.insecure_seed is None else Secure(), range(self.n))

    def charge(self, round: int) -> None:
        """Play a round for its entry in the ledger."""
        curator = self.curator()
        self._went(curator, curator.source(round), self.updates[:1], round, self.C)

    def _went(self, curator: Curator, noise: Noise, updates: Sequence[Update], round: int, C: float) -> Vector:
        released = curator.release(noise, updates, self.received, Layout.specs(self.received), round, min(C, 1e30))
        moved = {name: released.update.arrays[name] - self.received[name] for name in sorted(self.received)}
        return np.concatenate([array.ravel() for array in moved.values()]) * curator.m


def canaries(curator: Curator, rounds: int) -> Evidence:
    """Clients of their own direction each, in the federation by a coin; the auditor sees the model after every round."""
    m, section = CANARIES, curator.section
    secret = np.random.default_rng(int(Secure().uniform(1)[0] * 2**53))
    included = secret.random(m) < 0.5
    received: Arrays = {"x": np.zeros(4 * m)}
    there = {int(k): Update(1, int(k), {"x": _direction(4 * m, int(k))}, 1) for k in np.flatnonzero(included)}
    scores, C = np.zeros(m), section.clipping_norm
    for round in range(1, rounds + 1):
        noise = curator.source(round)
        asked = curator.sample(noise, there)
        scale = FAR * min(C, 1e6)
        updates = [replace(there[client], arrays={"x": scale * there[client].arrays["x"]}) for client in asked]
        released = curator.release(noise, updates, received, Layout.specs(received), round, C)
        scores += (released.update.arrays["x"] - received["x"])[:m]
        C = released.clipping_norm
    return judge(scores, included, curator.plan.delta)


def _direction(numbers: int, place: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    found = np.zeros(numbers)
    found[place] = 1.0
    return found


def rounds_within(plan_steps: int, plan_rounds: int, most: int) -> int:
    """Rounds of an audit of at most so many steps; one at least."""
    return max(1, min(plan_rounds, math.floor(most / plan_steps)))
