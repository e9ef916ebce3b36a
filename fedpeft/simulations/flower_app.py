"""The project as a Flower app: `flwr run flower-app`, on Flower's own simulation or on stock SuperNodes.

    flwr run flower-app --stream --run-config 'config="/abs/config.yaml" overrides="strategy.num_rounds=3" out="/abs/run"'

Every SuperNode is one client of the config's partition: the one that its `partition-id` names. The round loop, the wire and
the worker are those of `fedpeft simulate`, so that the run ends at the same adapter. What a client remembers between rounds lies
in Flower's own context, which lasts as long as the run and the SuperNode do. Hence `fedpeft server` and `fedpeft client` are
the way for data that must not leave its owner, for ledgers, and for runs that outlive a crash.
"""

from __future__ import annotations

import functools
import pathlib
import shlex
import time
from typing import Any

import numpy as np
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpeft import environment, wire
from fedpeft.client.history import Rounds, State
from fedpeft.config import Config
from fedpeft.errors import Problems, RunStopped, UserError
from fedpeft.quiet import quiet_libraries
from fedpeft.records import Assignment, Failure, Update
from fedpeft.screen import Screen, choose
from fedpeft.server import rounds
from fedpeft.server.making import check_global, make
from fedpeft.server.run_folder import RunFolder
from fedpeft.simulations.assemble import Parts, assemble
from fedpeft.simulations.run import announce, finish, free_folder, keep_samples
from fedpeft.training.prepare import Prepared

PARTITION = "partition-id"  # in a SuperNode's --node-config: Flower's own name for it
TASK, ROUND = "task", "round-"  # in the context of a client
NOTE_SECONDS = 10.0  # of waiting, after which it is said for whom

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The whole run. Raises UserError and RunStopped, which end it as failed with their line."""
    environment.prepare()
    given = {key: str(value) for key, value in context.run_config.items()}
    config = Config.load(given.get("config") or None, shlex.split(given.get("overrides", "")))
    _check(config)
    folder = RunFolder(pathlib.Path(given["out"]) if given.get("out") else free_folder(config.name).resolve())
    with choose(json=False) as screen, quiet_libraries():
        parts = assemble(config, folder.check_free)
        folder.create(config)
        announce(config, parts, folder, screen)
        nodes = Nodes(grid, config, len(parts.worker.nodes), screen)
        nodes.wait(config.strategy.round_timeout)
        ready = Prepared(parts.adapted, parts.strategy, parts.task, parts.worker.surveys, parts.worker.drawn)
        federation = make(config, ready, parts.test, parts.data_digest, nodes, len(parts.worker.nodes), parts.ranks, folder.ledger)
        keep_samples("before", config, parts, federation, federation.arrays, folder)
        outcome = rounds.run(federation, grid, folder, screen)
        screen.finished(finish(config, parts, federation, outcome, folder), folder.path)


def _check(config: Config) -> None:
    """What needs a disk at the client is not for here."""
    problems = Problems()
    if config.privacy is not None:
        problems.add("privacy", "a ledger must outlive a SuperNode, and here nothing does", do="use fedpeft simulate, or server and client")
    check_global(config, problems)
    problems.raise_if_any()


class Nodes:
    """Calling it gives client -> node of the SuperNodes that are there and have agreed."""

    def __init__(self, grid: Grid, config: Config, clients: int, screen: Screen) -> None:
        self.grid = grid
        self.task = np.frombuffer(config.to_yaml().encode(), np.uint8)
        self.clients = clients
        self.screen = screen
        self._agreed: dict[int, int] = {}
        self._asked: set[int] = set()
        self._pending: set[str] = set()

    def __call__(self) -> dict[int, int]:
        """Look who is there, ask those who have come, and hear who agrees."""
        there = set(self.grid.get_node_ids())
        come = sorted(there - self._asked)
        asked = [wire.assignment_to_message(Assignment(wire.JOIN, 0, 0, {TASK: self.task}), "", node) for node in come]
        self._pending |= {message_id for message_id in self.grid.push_messages(asked) if message_id} if asked else set()
        self._asked |= set(come)
        for message in self.grid.pull_messages(sorted(self._pending)) if self._pending else ():
            self._pending.discard(message.metadata.reply_to_message_id)
            self._hear(message)
        return {client: node for client, node in sorted(self._agreed.items()) if node in there}

    def wait(self, seconds: float) -> None:
        """Until every client of the partition is there. Raises RunStopped."""
        started, noted = time.monotonic(), False
        while len(there := self()) < self.clients:
            waited = time.monotonic() - started
            said = f"{len(there)} of the {self.clients} clients of the partition are there"
            if waited > seconds:
                raise RunStopped(f"{said} after {seconds:.0f} s; start a SuperNode for each, or set partition.clients to their number")
            if waited > NOTE_SECONDS and not noted:
                self.screen.note(f"{said}; waiting for SuperNodes with other values of {PARTITION}")
                noted = True
            time.sleep(wire.POLL_SECONDS)

    def _hear(self, message: Message) -> None:
        node = message.metadata.src_node_id
        try:
            if message.has_error():
                self.screen.note(f"node {node} does not take part: {message.error.reason}")
                return
            answer, _ = wire.message_to_answer(message)
        except wire.WireError as error:
            answer = Failure(0, 0, f"malformed: {error}")
        if isinstance(answer, Failure):
            self.screen.note(f"node {node} does not take part: {answer.reason}")
        elif answer.client in self._agreed and self._agreed[answer.client] in self.grid.get_node_ids():
            self.screen.note(f"node {node} does not take part: another has its {PARTITION}, {answer.client}")
        else:
            self._agreed[answer.client] = node


@client.query()
def query(message: Message, context: Context) -> Message:
    """What is asked before round 1."""
    return _reply(message, context)


@client.train()
def train(message: Message, context: Context) -> Message:
    """A round."""
    return _reply(message, context)


def _reply(message: Message, context: Context) -> Message:
    base = ""
    try:
        assignment, asked_for = wire.message_to_assignment(message)
        own = int(context.node_config[PARTITION])
        if assignment.action == wire.JOIN:
            context.state[TASK] = ConfigRecord({"yaml": assignment.arrays[TASK].tobytes().decode()})
        parts = _parts(str(context.state[TASK]["yaml"]))
        base = parts.worker.base
        answer = _answer(assignment, asked_for, own, parts, context)
    except wire.WireError as error:
        answer = Failure(0, 0, f"cannot be read: {error}")
    except UserError as error:
        answer = Failure(0, 0, f"refused: {error}".replace("\n", " | "))
    except KeyError as error:
        answer = Failure(0, 0, f"this SuperNode has no {error}: give it --node-config '{PARTITION}=0' with its number")
    return wire.answer_to_message(answer, base, message)


def _answer(assignment: Assignment, asked_for: str, own: int, parts: Parts, context: Context) -> Update | Failure:
    worker = parts.worker
    if own not in worker.nodes:
        return Failure(0, 0, f"{PARTITION} {own} is none of the {len(worker.nodes)} clients of the partition")
    if assignment.action == wire.JOIN:
        return Update(0, own, {}, len(worker.nodes[own].train))
    if assignment.client != own or asked_for != worker.base:
        return Failure(assignment.round, assignment.client, f"this is client {own} on base {worker.base}")
    known = _recall(context)
    state = known.after(assignment.round) if assignment.action == wire.SECOND else known.before(assignment.round)
    worker.memory, worker.kept = {own: dict(state.memory)}, dict(state.kept)
    with quiet_libraries():
        (answer,) = worker.answer([assignment])
    known.put(assignment.round, State(worker.memory.get(own, {}), worker.kept))
    _remember(context, known)
    return answer


@functools.lru_cache(maxsize=1)
def _parts(text: str) -> Parts:
    """The federation of a config: loaded once in every process that Flower keeps, such as an actor of its simulation."""
    environment.prepare()
    with quiet_libraries():
        return assemble(Config.from_dict(yaml.safe_load(text)))


def _recall(context: Context) -> Rounds:
    found: dict[str, Any] = {key.removeprefix(ROUND): record for key, record in context.state.items() if key.startswith(ROUND)}
    return Rounds(
        {int(number): State.unpacked({name: array.numpy() for name, array in record.items()}) for number, record in found.items()}
    )


def _remember(context: Context, known: Rounds) -> None:
    for key in [key for key in context.state if key.startswith(ROUND)]:
        del context.state[key]
    for number, state in known.states.items():
        context.state[f"{ROUND}{number}"] = ArrayRecord({name: Array(array) for name, array in state.packed().items()})
