"""A client's connection to a SuperLink: the calls of Flower's SuperNode, made from the process that holds the model.

Flower's own node starts a process for every message, drops a reply that it cannot deliver, and ends when a connection cannot
be made. The calls are those of the Fleet API, over gRPC; a SuperLink cannot tell the two apart.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from flwr.app import Message

from fedpeft.flower_private import Disconnected, Refused, RunOver

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

HEARTBEAT_SECONDS = 30.0  # Flower's own; a node counts as gone after two of them, until then it may come back and go on
CALL_SECONDS = 60.0  # for one request; arrays travel in requests of 5 MiB
NOT_OUR_SERVER = ("CERTIFICATE", "WRONG_VERSION_NUMBER")  # in what gRPC says of TLS; anything else about it may be a cut connection
CHUNK_SECONDS = 0.1  # between two looks at a part of a message that is not there yet


class Fleet:
    """The Fleet API of a SuperLink over gRPC, for the node whose key this is."""

    def __init__(self, address: str, certificates: bytes | None, key: EllipticCurvePrivateKey) -> None:
        from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
        from flwr.proto.fleet_pb2_grpc import FleetStub
        from flwr.supercore.grpc import create_channel
        from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        self._key = public_key_to_bytes(key.public_key())
        signing = [RuntimeVersionClientInterceptor(component_name="SuperNode"), NodeAuthClientInterceptor(key, key.public_key())]
        self._channel = create_channel(address, certificates is None, certificates, interceptors=signing)
        self._stub = FleetStub(self._channel)
        self.node = 0

    def activate(self, register: bool, known: int, idle: bool) -> int:
        """Say that this node is there; its id. With `register` it enters its key itself, where the SuperLink lets anyone.

        A node that was killed counts as there for a while, and cannot come. With work in hand it goes on under its `known` id;
        `idle`, it leaves first: a message that it was given and lost is then reported to the server at once.
        """
        from flwr.proto import fleet_pb2

        if register:
            with suppress(Refused):  # it was registered before
                self._call("RegisterNode", fleet_pb2.RegisterNodeFleetRequest(public_key=self._key))
        come = fleet_pb2.ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT_SECONDS)
        try:
            self.node = int(self._call("ActivateNode", come).node_id)
        except Refused:
            if not known:
                raise
            self.node = known
            if idle:
                self._call("DeactivateNode", fleet_pb2.DeactivateNodeRequest(node_id=known))
                self._call("ActivateNode", come)
            elif not self.beat():
                raise
        return self.node

    def beat(self) -> bool:
        """Say that this node is still there; False when the SuperLink does not know it."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        request = SendNodeHeartbeatRequest(node=self._node(), heartbeat_interval=HEARTBEAT_SECONDS)
        return bool(self._call("SendNodeHeartbeat", request).success)

    def receive(self) -> Message | None:
        """The next message for this node, if there is one. The SuperLink gives each out once."""
        from flwr.common.serde import message_from_proto
        from flwr.proto import fleet_pb2, message_pb2
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        answer = self._call("PullMessages", fleet_pb2.PullMessagesRequest(node=self._node()))
        if not answer.messages_list:
            return None
        head = message_from_proto(answer.messages_list[0])
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        contents: dict[str, bytes] = {}
        for tree in iterate_object_tree(answer.message_object_trees[0]):
            request = message_pb2.PullObjectRequest(node=self._node(), run_id=run_id, object_id=tree.object_id)
            while not (part := self._call("PullObject", request)).object_available:
                if not part.object_found:
                    raise RunOver(f"a part of the message {message_id} is gone")
                time.sleep(CHUNK_SECONDS)
            contents[tree.object_id] = part.object_content
        message = cast(Message, inflate_object_from_contents(message_id, contents))
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def confirm(self, message: Message) -> None:
        """Say that a message arrived whole: the SuperLink may forget it."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

        metadata = message.metadata
        self._call(
            "ConfirmMessageReceived",
            ConfirmMessageReceivedRequest(node=self._node(), run_id=metadata.run_id, message_object_id=metadata.message_id),
        )

    def send(self, reply: Message) -> None:
        """Deliver a reply; the same again changes nothing."""
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto import fleet_pb2, message_pb2
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

        reply.metadata.__dict__["_message_id"] = reply.object_id
        head = message_to_proto(remove_content_from_message(reply))
        request = fleet_pb2.PushMessagesRequest(
            node=self._node(), messages_list=[head], message_object_trees=[get_object_tree(reply)], clientapp_runtime_list=[0.0]
        )
        answer = self._call("PushMessages", request)
        parts = get_all_nested_objects(reply)
        for object_id in answer.objects_to_push:
            part = message_pb2.PushObjectRequest(
                node=self._node(),
                run_id=reply.metadata.run_id,
                session_id=answer.session_id,
                object_id=object_id,
                object_content=parts[object_id].deflate(),
            )
            self._call("PushObject", part)

    def leave(self) -> None:
        """Say goodbye, and close the connection."""
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        with suppress(Disconnected, Refused, RunOver):
            if self.node:
                self._call("DeactivateNode", DeactivateNodeRequest(node_id=self.node))
        self.close()

    def close(self) -> None:
        """Close the connection without a word: the node stays."""
        self._channel.close()

    def _node(self) -> Any:
        from flwr.proto.node_pb2 import Node

        return Node(node_id=self.node)

    def _call(self, method: str, request: Any) -> Any:
        import grpc

        try:
            return getattr(self._stub, method)(request, timeout=CALL_SECONDS)
        except ValueError as error:  # of a channel that was closed meanwhile
            raise Disconnected(str(error)) from error
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details() or "")
            if any(sign in details.upper() for sign in NOT_OUR_SERVER):
                raise Refused(f"the secure connection cannot be made ({details})") from error
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                raise Disconnected(details) from error
            if code is grpc.StatusCode.PERMISSION_DENIED:
                raise RunOver(details) from error
            raise Refused(_said(details) or code.name) from error


def _said(details: str) -> str:
    """What Flower says of an error to the outside: its details are JSON."""
    try:
        return str(json.loads(details)["public_message"])
    except (ValueError, KeyError, TypeError):
        return details
