"""The server's connection to its own SuperLink: what `flwr supernode register`, `flwr run` and the process that SuperExec starts
do, from the process that runs the round loop. The SuperLink runs with `--isolation process`, so that it starts nothing itself.
"""

from __future__ import annotations

import functools
import io
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.flower_private import RunOver, take_identity

ACQUIRE_SECONDS = 0.1  # between two looks for the run that was just started
REFUSED, UNAVAILABLE = 2, 3  # Flower's error codes for a client that did wrong, and for a message that cannot be had


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
    def run(self, limit_bytes: int) -> Iterator[Grid]:
        """A run of our own, all others of this SuperLink stopped, and a grid over it that takes replies of `limit_bytes`.

        Raises RunOver when the run was lost meanwhile.
        """
        from flwr.proto import control_pb2, fab_pb2, runtime_pb2
        from flwr.supercore.constant import TaskType
        from flwr.supercore.heartbeat import HeartbeatSender

        for run_id, run in self._control.ListRuns(control_pb2.ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                self._control.StopRun(control_pb2.StopRunRequest(run_id=run_id))
        started = self._control.StartRun(control_pb2.StartRunRequest(fab=fab_pb2.Fab(content=_empty_app())))
        wanted = runtime_pb2.AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while not (task := self._runtime.AcquireTask(wanted)).token:
            time.sleep(ACQUIRE_SECONDS)
        take_identity(started.run_id)
        grid = _grid_class()(self._address, self._certificates is None, self._certificates, token=task.token)
        grid.limit_bytes = limit_bytes
        heartbeat = HeartbeatSender(functools.partial(_beat, grid))
        heartbeat.start()
        try:
            from flwr.common.serde import run_from_proto

            grid.set_run(run_from_proto(grid._runtime_client.PullTaskInput(runtime_pb2.PullTaskInputRequest()).run))
            yield grid
            grid._runtime_client.PushTaskOutput(runtime_pb2.PushTaskOutputRequest(sub_status="completed"))
        finally:
            heartbeat.stop()
            grid.close()


def _beat(grid: Any) -> bool:
    """Tell the SuperLink that the run is still played. Flower's own function sends its process a Ctrl-C when it is not."""
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    with suppress(Exception):  # the calls that matter will find out
        grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    return True


@functools.cache
def _grid_class() -> Any:
    """Flower's HttpGrid, made when it is needed, whose `pull_messages` waits for nobody and bounds what a reply may bring.

    Flower's own waits inside the call, up to minutes, until a reply that was announced has arrived whole: one client that dies
    while it uploads would hold up the round beyond its deadline.
    """
    from flwr.app import Metadata
    from flwr.app.error import Error
    from flwr.app.message import make_message
    from flwr.proto import message_pb2, runtime_pb2
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.superlink.grid import HttpGrid

    class PatientGrid(HttpGrid):
        """Keeps what has arrived of a reply from one look to the next."""

        limit_bytes = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._arriving: dict[str, tuple[Any, Any, dict[str, bytes]]] = {}  # message answered -> head, tree, parts that are there
            self._give_up = self._retry_invoker.should_giveup
            self._retry_invoker.should_giveup = self._is_over

        def _is_over(self, error: Exception) -> bool:
            """Raises RunOver where the SuperLink says that the run is; Flower's own would send its process a Ctrl-C."""
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
                raise RunOver("Flower's run was ended from outside")
            return self._give_up is not None and self._give_up(error)

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            """The replies that are there as a whole. What was announced is kept for whoever asks: Flower says it but once."""
            wanted = list(message_ids)
            announced = self._runtime_client.PullMessages(runtime_pb2.PullAppMessagesRequest(message_ids=wanted))
            for head, tree in zip(announced.messages_list, announced.message_object_trees, strict=True):
                self._arriving[head.metadata.reply_to_message_id] = head, tree, {}
            found = [(answered, self._completed(answered)) for answered in sorted(self._arriving.keys() & set(wanted))]
            for answered, message in found:
                if message is not None:
                    del self._arriving[answered]
            return [message for _, message in found if message is not None]

        def forget(self, message_ids: Iterable[str]) -> None:
            """Nobody waits for these replies any more."""
            for answered in message_ids:
                self._arriving.pop(answered, None)

        def _completed(self, answered: str) -> Message | None:
            """Fetch what is missing of a reply; None while a part of it is."""
            head, tree, parts = self._arriving[answered]
            for object_id in [one.object_id for one in iterate_object_tree(tree) if one.object_id not in parts]:
                request = message_pb2.PullObjectRequest(node=self.node, run_id=head.metadata.run_id, object_id=object_id)
                answer = self._runtime_client.PullObject(request)
                if not answer.object_found:
                    return self._lost(head, "the upload was broken off", UNAVAILABLE)
                if not answer.object_available:
                    return None
                parts[object_id] = answer.object_content
                if sum(map(len, parts.values())) > self.limit_bytes:
                    return self._lost(head, f"the reply is larger than the {self.limit_bytes:,} bytes that are expected at most")
            message_id = head.metadata.message_id
            confirm = message_pb2.ConfirmMessageReceivedRequest(node=self.node, run_id=head.metadata.run_id, message_object_id=message_id)
            self._runtime_client.ConfirmMessageReceived(confirm)
            try:
                message = cast(Message, inflate_object_from_contents(message_id, parts))
            except Exception as error:  # the parts are whatever a client has sent
                return self._lost(head, f"the reply cannot be put together ({type(error).__name__})")
            message.metadata.__dict__["_message_id"] = message_id
            return message

        def _lost(self, head: Any, reason: str, code: int = REFUSED) -> Message:
            metadata = Metadata(head.metadata.run_id, "", 1, 1, head.metadata.reply_to_message_id, "", 0.0, 0.0, "system")
            return make_message(metadata=metadata, error=Error(code, reason))

    return PatientGrid


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
