"""A client that stays: it agrees to a task once, keeps base, tokenizer and engine loaded, and answers message after message.

The only client code is worker.py. What comes is data: a task is names and numbers, looked up among what is installed here.
"""

from __future__ import annotations

import json
from typing import Any

from flwr.app import Message

from fedpeft import wire
from fedpeft.client.history import State
from fedpeft.client.memory import Folder, Memory
from fedpeft.client.node import Node
from fedpeft.client.own_file import OwnFile, agree
from fedpeft.client.worker import Worker
from fedpeft.data.unusable import skipped, usable
from fedpeft.errors import Problems, UserError
from fedpeft.quiet import quiet_libraries
from fedpeft.records import Arrays, Assignment, Failure, Update
from fedpeft.screen import Screen
from fedpeft.training import prepare
from fedpeft.units import format_bytes

ASKED = ("limits.", "model.", "adapter.", "strategy.", "training.", "privacy.")  # what of a task may be wrong for the server to know
WITHHELD = "this client's own data or file does not go with the task; the person who runs it has been told why"
UNJOINED = "missing task: this client was started anew and has not joined"


class Resident:
    """Answers messages; `over` is set by the last one of a run."""

    def __init__(self, own: OwnFile, folder: Folder, screen: Screen) -> None:
        self.own = own
        self.folder = folder
        self.screen = screen
        self.over: dict[str, Any] | None = None
        self.client = -1
        self._task = b""
        self._worker: Worker | None = None
        self._memory: Memory | None = None

    def answer(self, message: Message) -> Message:
        """The reply to a message from the server, whatever it is."""
        try:
            assignment, base = wire.message_to_assignment(message)
        except wire.WireError as error:
            return wire.answer_to_message(Failure(0, 0, f"cannot be read: {error}"), "", message)
        except Exception as error:  # as below
            return wire.answer_to_message(Failure(0, 0, f"cannot be read: {type(error).__name__}"), "", message)
        try:
            answer = self._answer(assignment, base)
        except Exception as error:  # a message that ended this client would be taken up again by the next, for ever
            self.screen.note(f"round {assignment.round}: broke: {type(error).__name__}: {error}")  # the words may hold what is ours
            answer = Failure(assignment.round, assignment.client, f"broke: {type(error).__name__}")
        reply = wire.answer_to_message(answer, self._worker.base if self._worker else "", message)
        self._tell(assignment, answer)
        return reply

    def _answer(self, assignment: Assignment, base: str) -> Update | Failure:
        if assignment.action == wire.JOIN:
            return self._join(assignment)
        if assignment.action == wire.END:
            self._end(assignment)
            return Update(0, assignment.client, {}, 1)
        return self._work(assignment, base)

    def _join(self, assignment: Assignment) -> Update | Failure:
        try:
            self._load(assignment.client, assignment.arrays["task"].tobytes())
        except UserError as error:
            for line in str(error).splitlines():
                self.screen.note(f"refused: {line}")
            told = [str(problem) for problem in error.problems if problem.where.startswith(ASKED)]
            more = [WITHHELD] if len(told) < len(error.problems) else []
            return Failure(0, assignment.client, "refused: " + " | ".join([*told, *more]))
        except (KeyError, TypeError, ValueError) as error:
            return Failure(0, assignment.client, f"refused: the task cannot be read ({type(error).__name__})")
        assert self._worker is not None
        return Update(0, assignment.client, {}, len(self._worker.nodes[self.client].train))

    def recall(self) -> None:
        """After a restart: load the task that was agreed to before, so that work at hand can go on."""
        if task := self.folder.newest_task():
            kept = json.loads(task)
            try:
                self._load(kept["client"], kept["task"].encode())
            except UserError as error:
                self.screen.note(f"the task of before is not taken up again: {error}")

    def _load(self, client: int, task: bytes) -> None:
        if self._worker is not None and (client, task) == (self.client, self._task):
            return
        agreed = agree(self.own, json.loads(task))
        memory = Memory(self.folder, agreed.run)
        config, labels = agreed.config, len(agreed.examples.label_names)
        problems = Problems()
        with quiet_libraries():
            prepare.check(config, labels, problems)
            problems.raise_if_any()
            ready = prepare.prepare(config, labels)
            encoded = ready.task.encode(agreed.examples, ready.adapted.base, config.data)
            mine = usable(encoded.usable(), "this client", agreed.examples, encoded)
            node = Node.split(client, mine, config.data, config.seed, ready.task, ready.adapted.base)
        for note in skipped("own", agreed.examples, encoded, config.data):
            self.screen.note(note)
        surveys = ready.surveys if self.own.limits.surveys else {}
        guards = prepare.guards(config, ready.adapted, {client: (str(client), len(node.train))}, lambda client: memory.ledger)
        for guard in guards.values():
            guard.ledger.check(memory.trained)
        self._worker = Worker(config, ready.adapted, ready.task, ready.strategy, {client: node}, surveys, agreed.clients, guards)
        self._memory, self.client, self._task = memory, client, task
        memory.write_task(json.dumps({"client": client, "task": task.decode()}).encode())
        rounds, strategy = config.strategy.num_rounds, config.strategy.name
        self.screen.note(f"{config.name}: {strategy}, {rounds} rounds, with {len(mine):,} examples of this client (number {client})")

    def _work(self, assignment: Assignment, base: str) -> Update | Failure:
        worker, memory = self._worker, self._memory
        if worker is None or memory is None:
            return Failure(assignment.round, assignment.client, UNJOINED)
        if reason := self._beyond(assignment, base, worker, memory):
            return Failure(assignment.round, assignment.client, reason)
        self.screen.note(f"round {assignment.round}: {assignment.action} ...")
        state = memory.rounds.after(assignment.round) if assignment.action == wire.SECOND else memory.rounds.before(assignment.round)
        worker.memory, worker.kept = {self.client: dict(state.memory)}, dict(state.kept)
        with quiet_libraries():
            (answer,) = worker.answer([assignment])
        memory.write(assignment.round, State(worker.memory.get(self.client, {}), worker.kept))
        return answer

    def _beyond(self, assignment: Assignment, base: str, worker: Worker, memory: Memory) -> str:
        """Why an assignment is not what was agreed to, if it is not."""
        if assignment.client != self.client:
            return f"wrong client: this is client {self.client}, asked for {assignment.client}"
        if base != worker.base:
            return f"other base model: fingerprint {worker.base} here, {base} there"
        if assignment.round > worker.config.strategy.num_rounds:
            return f"limits: round {assignment.round} of {worker.config.strategy.num_rounds}"
        if assignment.action == wire.TRAIN and memory.trained >= self.own.limits.max_rounds:
            return f"limits: this client has trained {memory.trained} times in this run, limits.max_rounds is {self.own.limits.max_rounds}"
        return ""

    def _end(self, assignment: Assignment) -> None:
        self.over = _read_json(assignment.arrays, "summary")
        if self._memory is not None:
            self._memory.forget()

    def _tell(self, assignment: Assignment, answer: Update | Failure) -> None:
        """Put on record, and on the screen, what is about to leave this machine."""
        arrays = {} if isinstance(answer, Failure) else answer.arrays
        size = sum(array.nbytes for array in arrays.values())
        if self._memory is not None:
            line = {
                "round": assignment.round,
                "action": assignment.action[:50],
                "bytes": size,
                "tensors": sorted(arrays),
                "failed": isinstance(answer, Failure),
            }
            self._memory.note_sent(line)
        if isinstance(answer, Failure) and assignment.action != wire.JOIN:
            self.screen.note(f"round {answer.round}: not done: {answer.reason}")
        elif isinstance(answer, Update) and assignment.action not in (wire.JOIN, wire.END):
            loss = f", loss {answer.metrics['loss']:.4f}" if "loss" in answer.metrics else ""
            self.screen.note(f"round {answer.round}: {assignment.action} done{loss}, sending {len(arrays)} tensors ({format_bytes(size)})")


def _read_json(arrays: Arrays, name: str) -> dict[str, Any]:
    try:
        found = json.loads(arrays[name].tobytes())
    except (KeyError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
