"""What each client is sent in a round, and what becomes of the answers: the checks of validation.py for one after another.

Answers are judged as they come and handed on; nothing here keeps their tensors, so that a strategy that only adds them up
(`Strategy.streams`) needs no memory for the number of clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedpeft import arrays as arithmetic
from fedpeft.records import BESIDE, Arrays, Assignment, Failure, TensorSpec, Update, merged_round
from fedpeft.server import validation
from fedpeft.server.exchange import Exchange
from fedpeft.server.federation import Federation, Outcome


@dataclass(frozen=True)
class Asked:
    """The assignments of a round, and how much of the global product a client of smaller rank could not be sent."""

    assignments: list[Assignment]
    left_out: dict[int, float] = field(default_factory=dict)  # client -> relative error


@dataclass
class Judged:
    """What is remembered of a round's replies after validation."""

    accepted: list[Update] = field(default_factory=list)  # without their tensors
    failed: list[Failure] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # spent on waiting for the replies, and on judging them


def assign(federation: Federation, action: str, clients: Sequence[int], outcome: Outcome, round: int) -> Asked:
    """What the strategy sends, with what a client has not seen yet, and the digest of what it holds already."""
    at = federation.at(round)
    resting = federation.resting(outcome.arrays)
    own = [name for name in outcome.arrays if merged_round(name) < 0 and name not in resting]
    every = set(federation.strategy.sends(own, at))
    drawn = {name: array for name, array in federation.arrays.items() if name not in every and not name.startswith(BESIDE)}
    first = {name for name, array in drawn.items() if not np.array_equal(outcome.arrays[name], array)}  # a survey changed them
    made: dict[tuple[int, int | None], tuple[Arrays, str, float]] = {}
    asked = Asked([])
    for client in clients:
        seen, rank = outcome.seen.get(client, -1), federation.ranks.get(client)
        if (seen, rank) not in made:
            names = every | (first if seen < 0 else set()) | {name for name in outcome.arrays if merged_round(name) > seen}
            held = {name: array for name, array in outcome.arrays.items() if name not in names and not name.startswith(BESIDE)}
            fitted, left_out = outcome.arrays, 0.0
            if rank is not None:
                fitted, left_out = federation.strategy.fit(outcome.arrays, federation.layout, federation.at(round, client).layout)
            sent = {name: array for name, array in fitted.items() if name in names}
            made[seen, rank] = sent, arithmetic.digest(held) if held else "", left_out
        sent, digest, asked.left_out[client] = made[seen, rank]
        asked.assignments.append(Assignment(action, round, client, sent, digest))
    return asked


def judge(
    traffic: Exchange,
    federation: Federation,
    specs: Callable[[int], Mapping[str, TensorSpec]],
    judged: Judged,
    received: Arrays | None = None,
) -> Iterator[Update]:
    """Validate every reply as it comes, and hand on the updates that are accepted; with `received`, also how far they moved from there."""
    since = time.perf_counter()
    for reply in traffic.replies:
        answer = validation.judge(reply, federation.base, specs(reply.asked.client))
        if isinstance(answer, Update) and received is not None:
            start = {**received, **reply.asked.arrays}
            most, may_stay = federation.config.strategy.max_update_norm, federation.strategy.personal
            norm, reason = validation.movement(answer, start, most, may_stay)
            judged.norms[str(answer.client)] = norm
            answer = validation.refused(answer, reply.asked, reason) if reason else answer
        if isinstance(answer, Failure):
            judged.failed.append(answer)
            continue
        judged.accepted.append(replace(answer, arrays={}))
        judged.seconds += time.perf_counter() - since
        yield answer
        del answer, reply  # before the next is read
        since = time.perf_counter()
    judged.seconds += time.perf_counter() - since
