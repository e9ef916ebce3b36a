"""Every private name of Flower that fedpeft touches, each with its reason. Moving to another Flower is this file and its test.

Tested with flwr 1.39. Everything else in the package keeps to the public Message API (`flwr.app`, `flwr.serverapp.Grid`).

    messages    Flower's protobuf and back; the process-wide ids that a message is built from
    Fleet       a client's connection to a SuperLink: the calls of a SuperNode, in this process
    Link        the server's connection to its own SuperLink: node keys, a run, and the grid of that run
"""

from __future__ import annotations

import io
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from flwr.app import Message
from flwr.serverapp import Grid

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

HEARTBEAT_SECONDS = 10.0  # the shortest that Flower takes; a node counts as gone after two of them
CALL_SECONDS = 60.0  # for one request; arrays travel in requests of 5 MiB
CHUNK_SECONDS = 0.1  # between two looks at an object that the other side has announced and not yet sent


class Disconnected(Exception):
    """Nobody answers at the other end; later, somebody may."""


class Refused(Exception):
    """The other end answers, and will not have us."""


class RunOver(Exception):
    """The run that a message belongs to is no longer running."""


# --- messages


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


# --- a client's side: the calls that a SuperNode makes. Flower's own starts a process for every message, and ends its process when
# a connection cannot be made; ours answers from the process that holds the model, and goes on trying.


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

    def activate(self, register: bool, known: int) -> int:
        """Say that this node is there; its id. One that was killed still counts as there: it goes on under its `known` id.

        With `register` the node enters its key itself, where the SuperLink lets anyone.
        """
        from flwr.proto import fleet_pb2

        if register:
            with suppress(Refused):  # it was registered before
                self._call("RegisterNode", fleet_pb2.RegisterNodeFleetRequest(public_key=self._key))
        try:
            answer = self._call("ActivateNode", fleet_pb2.ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT_SECONDS))
            self.node = int(answer.node_id)
        except Refused:
            self.node = known
            if not known or not self.beat():
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
        except grpc.RpcError as error:
            code, details = error.code(), str(error.details() or "")
            if "handshake" in details.lower() or "certificate" in details.lower():
                raise Refused(f"the secure connection cannot be made ({details})") from error
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                raise Disconnected(details) from error
            if code is grpc.StatusCode.PERMISSION_DENIED:
                raise RunOver(details) from error
            raise Refused(f"{code.name}: {details}") from error


# --- the server's side: what `flwr supernode register`, `flwr run` and the process that SuperExec starts do, in this process.


@dataclass(frozen=True)
class NodeFacts:
    """What the SuperLink knows of a node."""

    node: int
    public_key: bytes
    online: bool
    activated: str  # when it last came


def superlink() -> None:
    """Be Flower's SuperLink; arguments are those of the command line. Its console script cannot be found without a PATH."""
    from flwr.superlink.cli import flower_superlink

    flower_superlink()


def public_key_bytes(text: str) -> bytes:
    """A public key in OpenSSH's form as Flower stores it."""
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    return public_key_to_bytes(cast(Any, load_ssh_public_key(text.encode())))


class Link:
    """The Control and Runtime APIs of the SuperLink at `address` (on loopback)."""

    def __init__(self, address: str, certificates: bytes | None) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.retry import make_simple_http_retry_invoker
        from flwr.supercore.runtime import RuntimeHttpClient

        self._address, self._certificates = address, certificates
        retry = make_simple_http_retry_invoker()
        insecure = certificates is None
        self._control = ControlHttpClient.from_server_address(address, insecure, certificates, [], retry_invoker=retry)
        version = RuntimeVersionHttpInterceptor(component_name="flower-superexec")
        self._runtime = RuntimeHttpClient.from_server_address(address, insecure, certificates, [version], retry_invoker=retry)

    def nodes(self) -> list[NodeFacts]:
        """Every node that is registered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        found = self._control.ListNodes(ListNodesRequest()).nodes_info
        return [NodeFacts(node.node_id, node.public_key, node.status == "online", node.last_activated_at) for node in found]

    def register(self, public_key: bytes, name: str) -> None:
        """Let the node with this key in."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        self._control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))

    def unregister(self, node: int) -> None:
        """Shut a node out."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._control.UnregisterNode(UnregisterNodeRequest(node_id=node))

    @contextmanager
    def run(self) -> Iterator[Grid]:
        """A run of our own, all others of this SuperLink stopped, and Flower's grid over it. RunOver when it was lost meanwhile."""
        from flwr.proto import control_pb2, fab_pb2, runtime_pb2
        from flwr.supercore.constant import TaskType
        from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
        from flwr.supercore.run import RunNotRunningException
        from flwr.superlink.grid import HttpGrid

        for run_id, run in self._control.ListRuns(control_pb2.ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                self._control.StopRun(control_pb2.StopRunRequest(run_id=run_id))
        started = self._control.StartRun(control_pb2.StartRunRequest(fab=fab_pb2.Fab(content=_empty_app())))
        wanted = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while not (task := self._runtime.AcquireTask(wanted)).token:
            time.sleep(CHUNK_SECONDS)
        take_identity(started.run_id)
        grid = HttpGrid(self._address, self._certificates is None, self._certificates, token=task.token)
        heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        heartbeat.start()
        try:
            from flwr.common.serde import run_from_proto

            grid.set_run(run_from_proto(grid._runtime_client.PullTaskInput(runtime_pb2.PullTaskInputRequest()).run))
            yield grid
            grid._runtime_client.PushTaskOutput(runtime_pb2.PushTaskOutputRequest(sub_status="completed"))
        except RunNotRunningException as error:
            raise RunOver("Flower's run was ended") from error
        finally:
            heartbeat.stop()
            grid.close()


def _empty_app() -> bytes:
    """The app that Flower wants for a run. Nobody loads it: server and clients run the fedpeft that is installed."""
    text = """
[project]
name = "fedpeft-run"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedpeft"
[tool.flwr.app.components]
serverapp = "fedpeft_runs_what_is_installed:server"
clientapp = "fedpeft_runs_what_is_installed:client"
"""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pyproject.toml", text)
    return file.getvalue()
