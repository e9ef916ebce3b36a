"""Send a round's messages through a Flower `Grid` and hand on the replies in the order of clients, each as soon as it can be.

A grid whose clients are in this process, or in processes of ours, says how many it wants at a time: `grid.cohort(asked)` clients
together, and so many such cohorts on their way (`grid.cohorts_at_once`). Others are sent everything at once, and one that keeps parts
of replies is told whose nobody waits for any more (`grid.forget(message_ids)`). So a simulation of thousands of clients holds the
messages of a few cohorts, and a deployment those that came too early.

A client that goes away in between (it was killed, or cut off) and has lost its message is asked again when it is back soon: its
answer is the same. One that comes back with its message in hand was never gone, as far as the roster can see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft import flower_private, wire
from fedpeft.records import Assignment

AWAY = {3, 5}  # Flower's error codes of a message that got lost with its node, and of a node that is not there
RETURN_SECONDS = 30.0  # that a round waits for a client that went away


@dataclass(frozen=True)
class Reply:
    """One client's reply, or None when none came in time."""

    asked: Assignment
    message: Message | None


class Exchange:
    """A round's traffic: every client of `assignments` is asked (at its node in `roster`) while `replies` is read, which is once.

    The replies come in the order of clients and at most `timeout` seconds are spent on them. `there` says who is there now.
    """

    def __init__(
        self,
        grid: Grid,
        assignments: Sequence[Assignment],
        roster: dict[int, int],
        base: str,
        timeout: float,
        there: Callable[[], dict[int, int]] | None = None,
    ) -> None:
        self.grid = grid
        self.assignments = sorted(assignments, key=lambda asked: asked.client)
        self.base = base
        self.there = there
        self.bytes_down = self.bytes_up = 0  # so far
        self.replies = self._replies(roster, timeout)
        self._by_id: dict[str, Assignment] = {}
        self._arrived: dict[int, Message] = {}
        self._away: dict[int, float] = {}  # client -> until when it is waited for

    def after(self, other: Exchange) -> Exchange:
        """These replies, and the bytes of both."""
        self.bytes_down += other.bytes_down
        self.bytes_up += other.bytes_up
        return self

    def _replies(self, roster: dict[int, int], timeout: float) -> Iterator[Reply]:
        ends = time.monotonic() + timeout
        together: Callable[[int], int] = getattr(self.grid, "cohort", lambda asked: max(1, asked))
        size = together(len(self.assignments))
        cohorts = [self.assignments[start : start + size] for start in range(0, len(self.assignments), size)]
        ahead = iter(cohorts)
        for number, cohort in enumerate(cohorts):
            for _ in range(getattr(self.grid, "cohorts_at_once", 1) if number == 0 else 1):
                self._ask(next(ahead, []), roster)
            over = False
            for asked in cohort:
                while not over and self._is_awaited(asked.client):
                    self._look(ends)
                    over = time.monotonic() >= ends
                    if not over and self._is_awaited(asked.client):
                        time.sleep(wire.POLL_SECONDS)
                message = self._arrived.pop(asked.client, None)
                self.bytes_up += len(flower_private.to_bytes(message)) if message is not None else 0
                yield Reply(asked, message)
                del message  # before the next is looked for
        getattr(self.grid, "forget", lambda late: None)(list(self._by_id))

    def _ask(self, some: Sequence[Assignment], nodes: dict[int, int]) -> None:
        messages = [wire.assignment_to_message(assignment, self.base, nodes[assignment.client]) for assignment in some]
        self.bytes_down += sum(len(flower_private.to_bytes(message)) for message in messages)
        pushed = zip(self.grid.push_messages(messages) if messages else (), some, strict=True)
        self._by_id.update({message_id: asked for message_id, asked in pushed if message_id})  # none for a node that has left

    def _is_awaited(self, client: int) -> bool:
        return client in self._away or any(asked.client == client for asked in self._by_id.values())

    def _look(self, ends: float) -> None:
        """Take what has arrived, and ask those again who went away and are back."""
        for message in self.grid.pull_messages(sorted(self._by_id)) if self._by_id else ():
            assignment = self._by_id.pop(message.metadata.reply_to_message_id, None)
            if assignment is not None:
                self._arrived[assignment.client] = message
                self._away.pop(assignment.client, None)
                if self.there is not None and message.has_error() and message.error.code in AWAY:
                    self._away[assignment.client] = min(ends, time.monotonic() + RETURN_SECONDS)
        if self.there is not None and (self._by_id or self._away):
            now, here = time.monotonic(), self.there()
            for client in {assignment.client for assignment in self._by_id.values()} - here.keys():
                self._away.setdefault(client, min(ends, now + RETURN_SECONDS))
            returned = self._away.keys() & here.keys()
            self._by_id = {message_id: asked for message_id, asked in self._by_id.items() if asked.client not in returned}
            self._ask([assignment for assignment in self.assignments if assignment.client in returned], here)
            self._away = {client: until for client, until in self._away.items() if client not in returned and now < until}
