"""Every private name of Flower that fedpeft touches, each with its reason. Moving to another Flower is these files and their test.

Tested with flwr 1.39. Everything else in the package keeps to the public Message API (`flwr.app`, `flwr.serverapp.Grid`).

    flower_private.py    messages: Flower's protobuf and back, and the process-wide ids that a message is built from
    flower_fleet.py      a client's connection to a SuperLink: the calls of a SuperNode, in this process
    flower_link.py       the server's connection to its own SuperLink: node keys, a run, and the grid of that run
"""

from __future__ import annotations

import uuid
from typing import cast

from flwr.app import Message


class Disconnected(Exception):
    """Nobody answers at the other end; later, somebody may."""


class Refused(Exception):
    """The other end answers, and will not have us."""


class RunOver(Exception):
    """The run that a message belongs to is no longer running."""


def take_identity(run_id: int) -> None:
    """Let `Message(...)` be built in a process that no SuperLink started: its constructor reads these process-wide ids."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, 1, 1


def stamp(message: Message) -> Message:
    """Give a message the id that a SuperLink would give it; replies name it. Metadata has no public setter for it."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    return message


def to_bytes(message: Message) -> bytes:
    """The message as Flower puts it on the wire: its protobuf, serialised. The public API has no such call."""
    from flwr.common.serde import message_to_proto

    return cast(bytes, message_to_proto(message).SerializeToString())


def from_bytes(data: bytes) -> Message:
    """The message in serialised protobuf."""
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as Proto

    return message_from_proto(Proto.FromString(data))
