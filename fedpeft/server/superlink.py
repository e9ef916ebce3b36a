"""Flower's SuperLink as a process of ours: only the Fleet API can be reached from outside, everything else is on loopback.

    clients -- gRPC, TLS, node keys --> Fleet API of the SuperLink <-- loopback -- this process (flower_link.Link, rounds.py)

It keeps its state in a database, so that it can be killed at any moment: it is started again with the same state, and no
reply that had arrived is lost. It ends when this process does, however that ends: it reads a pipe that nobody writes to.

    python -m fedpeft.server.superlink ARGUMENTS     is what is started: Flower's own command, and the end of that pipe
"""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from fedpeft import environment
from fedpeft.addresses import LOOPBACK, free_port, joined, parsed
from fedpeft.errors import Problem, RunStopped, UserError

START_SECONDS, ATTEMPTS = 60.0, 3
SETTLE_SECONDS = 15.0  # for a port that a dying predecessor still holds
RESTART_SECONDS = (0.5, 30.0)  # at first, at most


class SuperLink:
    """A SuperLink that listens at `address` and is started again whenever it dies; a context manager."""

    def __init__(self, folder: pathlib.Path, address: str, keys: pathlib.Path | None, note: Callable[[str], None]) -> None:
        self.folder = folder
        self.host, self.port = parsed(address, "--address")
        self.keys = keys
        self.note = note
        self.http_port = free_port()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def http_address(self) -> str:
        """Where its Control and Runtime APIs are."""
        return f"{LOOPBACK}:{self.http_port}"

    @property
    def log(self) -> pathlib.Path:
        """What Flower says."""
        return self.folder / "superlink.log"

    def __enter__(self) -> SuperLink:
        self.folder.mkdir(parents=True, exist_ok=True)
        _wait_until_free(self.host, self.port)
        for attempt in range(ATTEMPTS):
            self._start()
            if self._is_ready():
                break
            if attempt + 1 == ATTEMPTS:
                self.__exit__()
                lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
                raise RunStopped(f"Flower's SuperLink does not start ({self.log}): {' / '.join(lines[-3:])}")
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        assert self._process is not None
        return self._process.pid

    def _command(self) -> list[str]:
        secure = ["--insecure"]
        if self.keys is not None:
            files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
            secure = [word for option, name in files.items() for word in (option, str(self.keys / name))] + ["--enable-supernode-auth"]
        return [
            *(sys.executable, "-m", "fedpeft.server.superlink", *secure),
            *("--host", LOOPBACK, "--port", str(self.http_port)),
            *("--fleet-api-address", joined(self.host, self.port)),
            *("--isolation", "process", "--database", str(self.folder / "state.db"), "--disable-runtime-dependency-installation"),
        ]

    def _start(self) -> None:
        known = {**environment.DEFAULTS, **os.environ, "FLWR_HOME": str(self.folder)}
        with self.log.open("ab") as log:
            # A group of its own: Ctrl-C at the terminal is for this process, which then ends the SuperLink in its turn.
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.PIPE, stdout=log, stderr=log, env=known, start_new_session=True
            )

    def _is_ready(self) -> bool:
        """Wait until it answers; False when it ends instead, or takes too long."""
        assert self._process is not None
        ends = time.monotonic() + START_SECONDS
        while not (_answers(LOOPBACK, self.http_port) and _answers(self.host, self.port)):
            if self._process.poll() is not None or time.monotonic() > ends:
                return False
            time.sleep(0.1)
        return True

    def _watch(self) -> None:
        """Start it again when it dies. What goes on meanwhile waits: Flower's own calls try again until somebody answers."""
        pause = RESTART_SECONDS[0]
        while not self._stopping.is_set():
            assert self._process is not None
            started = time.monotonic()
            code = self._process.wait()
            pause = RESTART_SECONDS[0] if time.monotonic() - started > START_SECONDS else min(2 * pause, RESTART_SECONDS[1])
            if self._stopping.wait(pause):
                return
            self.note(f"the SuperLink ended (code {code}, {self.log}); it is started again with its state")
            self._start()


def _wait_until_free(host: str, port: int) -> None:
    """Two SuperLinks at one port would both be given clients: gRPC shares ports without a word."""
    ends = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
            return
        except OSError as error:
            if time.monotonic() > ends or isinstance(error, socket.gaierror):
                raise UserError(
                    Problem("--address", f"{host}:{port} cannot be listened at ({error.strerror})", do="name another")
                ) from error
        time.sleep(0.2)


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host if host not in ("0.0.0.0", "::") else "localhost", port), timeout=1):
            return True
    except OSError:
        return False


def _end_with(parent: int) -> None:
    """End this process when the pipe from its parent closes."""
    while os.read(parent, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    from fedpeft import flower_link

    threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
    flower_link.superlink()
