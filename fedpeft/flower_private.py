"""Every private name of Flower that fedpeft touches, each with its reason. Moving to another Flower is this file and its test.

Tested with flwr 1.39. Everything else in the package keeps to the public Message API (`flwr.app`, `flwr.serverapp.Grid`).
"""

from __future__ import annotations

import uuid
from typing import cast

from flwr.app import Message


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
