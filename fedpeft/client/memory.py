"""What a real client remembers, on its own disk: it can be killed at any moment and goes on as if nothing had happened.

    STATE/node                         its Flower node, under which it goes on after a kill
    STATE/inbox  STATE/outbox          the message that it is working on, and the reply until it has arrived
    STATE/RUN/task.json                the task it agreed to
    STATE/RUN/round-00003.safetensors  what the strategy remembers and what was sent but once, after its part in round 3
    STATE/RUN/sent.jsonl               a line for everything that has left this machine

What a round starts from, when the server was killed in it and asks again, is said in history.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import pathlib
import shutil
import time
from contextlib import suppress
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.numpy import load

from fedpeft import durable
from fedpeft.client.history import Rounds, State
from fedpeft.errors import Problem, UserError

OWN = ("node", "inbox", "outbox", "lock")  # files in STATE: no run is called so


class Folder:
    """STATE: one client's, used by one process at a time."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock: IO[str] = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(Problem("--state", f"another client uses {path}", do="stop it, or give this one another folder")) from error

    @property
    def node(self) -> int:
        """The node that the SuperLink knows this client as; 0 before it has been there."""
        try:
            return int((self.path / "node").read_text())
        except (OSError, ValueError):
            return 0

    @node.setter
    def node(self, node: int) -> None:
        durable.replace(self.path / "node", str(node).encode())

    def read(self, box: str) -> bytes | None:
        """The message in "inbox" or "outbox"."""
        path = self.path / box
        return path.read_bytes() if path.is_file() else None

    def put(self, box: str, message: bytes) -> None:
        """Keep a message, whatever happens next."""
        durable.replace(self.path / box, message)

    def empty(self) -> None:
        """The reply has arrived, or nobody wants it any more."""
        for box in ("inbox", "outbox"):
            (self.path / box).unlink(missing_ok=True)

    def newest_task(self) -> bytes | None:
        """The task that was agreed to last."""
        tasks = sorted(self.path.glob("*/task.json"), key=lambda path: path.stat().st_mtime)
        return tasks[-1].read_bytes() if tasks else None


class Memory:
    """One run's part of STATE."""

    def __init__(self, folder: Folder, run: str) -> None:
        if not run.isalnum() or len(run) > 64 or run in OWN:
            raise UserError(Problem("run", f"{run[:80]!r} is no name of a run"))
        self.path = folder.path / run
        self.path.mkdir(exist_ok=True, mode=0o700)
        self.rounds = Rounds()
        for file in sorted(self.path.glob("round-*.safetensors")):
            try:
                self.rounds.states[int(file.stem.partition("-")[2])] = State.unpacked(load(file.read_bytes()))
            except (SafetensorError, ValueError):
                file.unlink()

    @property
    def ledger(self) -> pathlib.Path:
        """What this client may have released in this run, where the run has privacy."""
        return self.path / "ledger.jsonl"

    def write_task(self, task: bytes) -> None:
        """Keep the task that was agreed to."""
        durable.replace(self.path / "task.json", task)

    def write(self, round: int, state: State) -> None:
        """Remember `state` after `round`, whatever happens next."""
        durable.replace(self._file(round), durable.tensors(state.packed()))
        self.rounds.put(round, state)
        for file in self.path.glob("round-*.safetensors"):
            if int(file.stem.partition("-")[2]) not in self.rounds.states:
                file.unlink()

    @property
    def trained(self) -> int:
        """Answers to training that have left this machine."""
        return sum(line["action"] == "train" and not line["failed"] for line in self.sent())

    def sent(self) -> list[dict[str, Any]]:
        """What has left this machine; a line that was torn was never sent."""
        path = self.path / "sent.jsonl"
        found = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def note_sent(self, line: dict[str, Any]) -> None:
        """Add a line to what has left this machine, before it leaves."""
        path = self.path / "sent.jsonl"
        torn = path.is_file() and not path.read_bytes().endswith(b"\n")
        with path.open("a") as file:
            file.write("\n" if torn else "")
            file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """The run is over: only what was sent stays on record."""
        for file in [*self.path.glob("round-*.safetensors"), self.path / "task.json"]:
            file.unlink(missing_ok=True)
        if not (self.path / "sent.jsonl").exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, round: int) -> pathlib.Path:
        return self.path / f"round-{round:05d}.safetensors"
