"""Real processes on loopback: a server with its SuperLink, and clients with data of their own, over TLS and node keys."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import yaml

from fedpeft import Config
from fedpeft.addresses import LOOPBACK, free_port
from fedpeft.keys import make
from fedpeft.simulations.assemble import deal

NAMES = ("anna", "ben", "carla")
DYING = str(pathlib.Path(__file__).parent / "dying.py")
ENVIRONMENT = {"PYTHONUNBUFFERED": "1"}


@dataclasses.dataclass
class Process:
    """A command of ours that runs, and what it has said so far."""

    popen: subprocess.Popen
    log: pathlib.Path

    @property
    def said(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text, seconds=60, times=1):
        wait_until(lambda: self.said.count(text) >= times or self.popen.poll() is not None, seconds, lambda: f"{text!r} in:\n{self.said}")
        assert self.said.count(text) >= times, f"it ended ({self.popen.returncode}) without {text!r}:\n{self.said}"

    def end(self, seconds=120):
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.said}") from None

    def kill(self):
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


def wait_until(condition: Callable[[], bool], seconds: float, said: Callable[[], str]) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds} s: {said()}"
        time.sleep(0.05)


class Deployment:
    """One server's folder, three clients' folders, and the processes that were started."""

    def __init__(self, folder: pathlib.Path, settings: dict, port: int | None = None):
        self.folder = folder
        self.run = folder / "run"
        self.keys = folder / "keys"
        self.port = port or free_port()
        self.config = folder / "config.yaml"
        self.processes: list[Process] = []
        self.config.write_text(yaml.safe_dump(settings))
        make(self.keys, ["localhost"], NAMES)
        split = deal(Config.load(self.config))
        for name, rows in zip(NAMES, split.partition.indices, strict=True):
            self.write_data(name, split.corpus.train.take(rows), settings)

    def write_data(self, name, examples, settings):
        with (self.folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(zip(examples.columns["text"], (examples.label_names[code] for code in examples.labels), strict=True))
        own = {"data": {"name": str(self.folder / f"{name}.csv"), "labels": list(examples.label_names)}}
        own["limits"] = {"models": [settings["model"]["name"]]}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(own))

    def start(self, name, *arguments, dying=()):
        log = self.folder / f"{name}-{len(self.processes)}.log"
        program = [DYING, self.died(name), ",".join(dying)] if dying else ["-m", "fedpeft"]
        with log.open("w") as file:
            popen = subprocess.Popen(
                [sys.executable, *program, *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
                cwd=self.folder,
            )
        self.processes.append(Process(popen, log))
        return self.processes[-1]

    def died(self, name):
        (self.folder / f"{name}-deaths").mkdir(exist_ok=True)
        return self.folder / f"{name}-deaths"

    def server(self, *more, dying=()):
        where = ["--address", f"{LOOPBACK}:{self.port}", "--keys", self.keys, "--out", self.run]
        return self.start("server", "server", self.config, *where, *more, dying=dying)

    def client(self, name, *more, port=None, dying=()):
        where = ["--server", f"{LOOPBACK}:{port or self.port}", "--keys", self.keys / name, "--data", self.folder / f"{name}.yaml"]
        return self.start(name, "client", *where, *more, dying=dying)

    def resume(self, dying=()):
        where = ["--address", f"{LOOPBACK}:{self.port}", "--keys", self.keys, "--out", self.run]
        return self.start("server", "server", *where, "--resume", dying=dying)

    def rounds(self):
        file = self.run / "rounds.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_round(self, number, seconds=120):
        server = self.processes[0]
        wait_until(lambda: len(self.rounds()) > number, seconds, lambda: server.said)

    def summary(self):
        return json.loads((self.run / "summary.json").read_text())

    def close(self):
        for process in self.processes:
            if process.popen.poll() is None:
                process.kill()


class Proxy:
    """A network that can be cut: what connects to `port` is passed on, until it is not."""

    def __init__(self, target):
        self.target, self.up, self.stalled = target, True, False
        self.pairs = []
        self.listener = socket.create_server((LOOPBACK, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((LOOPBACK, self.target)) if self.up else None
            except OSError:  # the server is not there yet
                far = None
            if far is None:
                near.close()
                continue
            self.pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source, sink):
        try:
            while data := source.recv(65536):
                while self.stalled:
                    time.sleep(0.05)
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.up = False
        pairs, self.pairs = self.pairs, []
        for end in [end for pair in pairs for end in pair]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def heal(self):
        self.up, self.stalled = True, False

    def close(self):
        self.heal()
        self.cut()
        self.listener.close()


def superlink_of(server):
    """The process id of a server's SuperLink."""
    return int(pathlib.Path(f"/proc/{server.popen.pid}/task/{server.popen.pid}/children").read_text().split()[0])


@pytest.fixture
def deploy(tmp_path):
    """Make deployments, and leave no process behind."""
    made = []

    def deploy(settings, name="deployment"):
        (tmp_path / name).mkdir()
        made.append(Deployment(tmp_path / name, settings))
        return made[-1]

    yield deploy
    for deployment in made:
        deployment.close()


@pytest.fixture
def three(tiny_settings):
    """The tiny run with three clients, all of which must be there."""
    settings = {**tiny_settings, "partition": {**tiny_settings["partition"], "clients": 3}}
    return {**settings, "strategy": {"num_rounds": 3, "min_available_nodes": 3, "round_timeout": 60}}
