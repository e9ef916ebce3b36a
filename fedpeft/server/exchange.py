"""Send a round's messages through a Flower `Grid` and gather the replies until all are there or the time is up.

A client that goes away in between (it was killed, or cut off) and has lost its message is asked again when it is back soon: its
answer is the same. One that comes back with its message in hand was never gone, as far as the roster can see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Exchange:
    """A round's traffic."""

    replies: list[Reply]  # in the order of clients
    bytes_down: int
    bytes_up: int

    def after(self, other: Exchange) -> Exchange:
        """These replies, and the bytes of both."""
        return Exchange(self.replies, self.bytes_down + other.bytes_down, self.bytes_up + other.bytes_up)


def exchange(
    grid: Grid,
    assignments: Sequence[Assignment],
    roster: dict[int, int],
    base: str,
    timeout: float,
    there: Callable[[], dict[int, int]] | None = None,
) -> Exchange:
    """Ask every client of `assignments` (at its node in `roster`) and wait at most `timeout` seconds. `there` says who is there now."""
    ends = time.monotonic() + timeout
    by_id: dict[str, Assignment] = {}
    arrived: dict[int, Message] = {}
    away: dict[int, float] = {}  # client -> until when it is waited for
    bytes_down = 0

    def ask(some: Sequence[Assignment], nodes: dict[int, int]) -> None:
        nonlocal bytes_down
        messages = [wire.assignment_to_message(assignment, base, nodes[assignment.client]) for assignment in some]
        bytes_down += sum(len(flower_private.to_bytes(message)) for message in messages)
        pushed = zip(grid.push_messages(messages), some, strict=True)
        by_id.update({message_id: assignment for message_id, assignment in pushed if message_id})  # none for a node that has left

    ask(assignments, roster)
    while by_id or away:
        for message in grid.pull_messages(sorted(by_id)) if by_id else ():
            assignment = by_id.pop(message.metadata.reply_to_message_id, None)
            if assignment is not None:
                arrived[assignment.client] = message
                away.pop(assignment.client, None)
                if there is not None and message.has_error() and message.error.code in AWAY:
                    away[assignment.client] = min(ends, time.monotonic() + RETURN_SECONDS)
        if there is not None and (by_id or away):
            now, here = time.monotonic(), there()
            for client in {assignment.client for assignment in by_id.values()} - here.keys():
                away.setdefault(client, min(ends, now + RETURN_SECONDS))
            returned = away.keys() & here.keys()
            by_id = {message_id: assignment for message_id, assignment in by_id.items() if assignment.client not in returned}
            ask([assignment for assignment in assignments if assignment.client in returned], here)
            away = {client: until for client, until in away.items() if client not in returned and now < until}
        if (by_id or away) and time.monotonic() >= ends:
            break
        if by_id or away:
            time.sleep(wire.POLL_SECONDS)
    replies = [Reply(asked, arrived.get(asked.client)) for asked in sorted(assignments, key=lambda asked: asked.client)]
    return Exchange(replies, bytes_down, sum(len(flower_private.to_bytes(message)) for message in arrived.values()))
