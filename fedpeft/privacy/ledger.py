"""The ledger of one client: what it may have released, written before it is released.

    DIR/client-3.jsonl   {"prev": HASH, "round": 4, "sigma": 1.1, "q": 0.05, "steps": 10}     a line a reservation

A reservation is on disk (fsync) before training starts and is never taken back: a crash after it counts, a crash before it
released nothing. A round that is played again has new noise and is a second release, charged again. Each line holds the
hash of the one before: a line that was changed, dropped or put elsewhere is found when the file is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from fedpeft import durable
from fedpeft.errors import Problem, UserError
from fedpeft.privacy.accounting import History, Release

FIRST = "0" * 64


class Ledger:
    """The releases of one client over the whole run, whoever was restarted in it. Raises UserError for a file that was edited."""

    def __init__(self, path: pathlib.Path | None) -> None:
        self.path = path  # None: kept in memory alone, for a dry run
        self.history: History = ()
        self.hash = FIRST
        if path is None or not path.exists():
            return
        whole = 0  # bytes up to the end of the last whole line
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # torn: it never became durable, and nothing was trained on it
                break
            self._read(line)
            whole += len(line)
        if whole < path.stat().st_size:
            os.truncate(path, whole)

    def _read(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            release = Release(float(entry["sigma"]), float(entry["q"]), int(entry["steps"]))
            fits = entry["prev"] == self.hash
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            got = f"line {len(self.history) + 1} does not follow from those before it: the file was edited, or lost lines"
            raise UserError(Problem(str(self.path), got, do="put the file back as it was; without it no epsilon can be stated"))
        self.history = (*self.history, release)
        self.hash = hashlib.sha256(line).hexdigest()

    def check(self, released: int) -> None:
        """Raise UserError when fewer are charged than are known to have left: a file without its end follows from nothing wrong."""
        if len(self.history) < released:
            got = f"{len(self.history)} releases are charged, and {released} updates have left this machine: the end is lost"
            raise UserError(Problem(str(self.path), got, do="put the file back as it was; without it no epsilon can be stated"))

    def reserve(self, round: int, release: Release) -> None:
        """Charge `release`; on disk when this returns."""
        entry = {"prev": self.hash, "round": round, "sigma": release.sigma, "q": release.q, "steps": release.steps}
        line = json.dumps(entry).encode() + b"\n"
        if self.path is not None:
            new = not self.path.exists()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    file.write(line)
                    os.fsync(file.fileno())
                    if new:  # its name has to last too
                        durable.sync(self.path.parent)
                        durable.sync(self.path.parent.parent)
                except OSError:  # nothing is trained on it, and the next line follows from the one before
                    os.truncate(self.path, before)
                    raise
        self.history = (*self.history, release)
        self.hash = hashlib.sha256(line).hexdigest()
