"""`LocalGrid`: a Flower `Grid` whose clients live in this process. The messages of a push reach the worker as one cohort.

Every message is serialised and read back on the way to a client and on the way home, so that a simulation exercises the
bytes of a deployment, counts them, and can share nothing by accident.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedpeft import flower_private, wire
from fedpeft.client.worker import Worker
from fedpeft.records import Assignment

RUN_ID = 1
FIRST_NODE = 1000  # node ids 0 and 1 mean something to Flower
CLIENT_RAISED = 2  # Flower's error code for a client whose code raised


class LocalGrid(Grid):
    """Clients in this process, one Flower node each.

    Every grid of a simulation is a context manager: inside its block the clients are there.
    """

    cohorts_at_once = 1  # a push is answered when it returns

    def __init__(self, worker: Worker) -> None:
        flower_private.take_identity(RUN_ID)
        self.worker = worker
        self.roster = {client: FIRST_NODE + client for client in sorted(worker.nodes)}
        self._replies: dict[str, Message] = {}
        self._run: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        """There is nothing to stop."""

    @staticmethod
    def check() -> None:
        """Raises UserError when there is no such grid on this machine, before anything is loaded."""

    def cohort(self, asked: int) -> int:
        """How many of so many clients are best sent their messages together."""
        return self.worker.cohort

    def get_node_ids(self) -> list[int]:
        """The node of every client."""
        return list(self.roster.values())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages; all of them are answered when this returns. Returns their ids."""
        sent = [flower_private.stamp(message) for message in messages]
        arrived = [flower_private.from_bytes(flower_private.to_bytes(message)) for message in sent]
        for reply in self._answer(arrived):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def _answer(self, messages: Sequence[Message]) -> list[Message]:
        return answers(self.worker, messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to the messages with these ids."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver messages and return their replies; there is nothing to wait for."""
        return self.pull_messages(self.push_messages(messages))

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Part of Flower's interface, deprecated there: use `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Any) -> None:
        """Part of Flower's interface: the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run that was set."""
        return self._run


def answers(worker: Worker, messages: Sequence[Message]) -> list[Message]:
    """The worker's replies to what has arrived, through the bytes that they would travel as."""
    read: list[tuple[Message, Assignment | None]] = []
    for message in messages:
        try:
            read.append((message, wire.message_to_assignment(message)[0]))
        except wire.WireError:
            read.append((message, None))
    given = iter(worker.answer([assignment for _, assignment in read if assignment is not None]))
    replies = []
    for message, assignment in read:
        if assignment is None:
            reply = Message(Error(CLIENT_RAISED, "the message cannot be read"), reply_to=message)
        else:
            reply = wire.answer_to_message(next(given), worker.base, message)
        replies.append(flower_private.from_bytes(flower_private.to_bytes(flower_private.stamp(reply))))
    return replies
