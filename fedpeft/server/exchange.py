"""Send a round's messages through a Flower `Grid` and gather the replies until all are there or the time is up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft import flower_private, wire
from fedpeft.records import Assignment


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


def exchange(grid: Grid, assignments: Sequence[Assignment], roster: dict[int, int], base: str, timeout: float) -> Exchange:
    """Ask every client of `assignments` (at its node in `roster`) and wait at most `timeout` seconds."""
    messages = [wire.assignment_to_message(assignment, base, roster[assignment.client]) for assignment in assignments]
    bytes_down = sum(len(flower_private.to_bytes(message)) for message in messages)
    ends = time.monotonic() + timeout
    pushed = zip(grid.push_messages(messages), assignments, strict=True)
    by_id = {message_id: assignment for message_id, assignment in pushed if message_id}  # a node that has left takes no message
    arrived: dict[int, Message] = {}
    pending = set(by_id)
    while pending:
        for message in grid.pull_messages(sorted(pending)):
            if message.metadata.reply_to_message_id in pending:
                pending.discard(message.metadata.reply_to_message_id)
                arrived[by_id[message.metadata.reply_to_message_id].client] = message
        if pending and time.monotonic() >= ends:
            break
        if pending:
            time.sleep(wire.POLL_SECONDS)
    replies = [Reply(asked, arrived.get(asked.client)) for asked in sorted(assignments, key=lambda asked: asked.client)]
    return Exchange(replies, bytes_down, sum(len(flower_private.to_bytes(message)) for message in arrived.values()))
