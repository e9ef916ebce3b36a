"""`take_part`: a client's life. Connect, answer, and connect again, until the run is over or a person stops it.

The connection is Flower's (flower_fleet.Fleet), in this process, beside the model. A message is on disk before it is
worked on and until its reply has arrived, so that nothing is lost by a kill; doing it again gives the same answer.
Ctrl-C (or SIGTERM) once: finish what is being done, send it, leave. Twice: leave at once; the work is taken up next time.
"""

from __future__ import annotations

import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from flwr.app import Message

from fedpeft import flower_private, keys, wire
from fedpeft.addresses import joined, parsed
from fedpeft.client.memory import Folder
from fedpeft.client.own_file import OwnFile, load
from fedpeft.client.resident import Resident
from fedpeft.errors import Problem, Problems, RunStopped, UserError
from fedpeft.flower_fleet import HEARTBEAT_SECONDS, Fleet
from fedpeft.flower_private import Disconnected, Refused, RunOver
from fedpeft.health import Health
from fedpeft.screen import Screen

AGAIN_SECONDS = (1.0, 15.0)  # between attempts to connect: at first, at most
REFUSED_SECONDS = 15.0  # a SuperLink that has just started knows no keys for a moment
LAST_SECONDS = 1.0  # for the server to fetch a reply from its SuperLink, before this client says goodbye to that


@dataclass(frozen=True)
class Place:
    """Where a client goes, and with what it proves who it is."""

    server: str  # HOST:PORT
    keys: pathlib.Path  # the folder with this client's name that `fedpeft keys` made
    state: pathlib.Path
    insecure: bool = False
    health: str | None = None


class Stop:
    """Set by the first Ctrl-C; the second is Python's own."""

    def __init__(self, screen: Screen) -> None:
        self.wanted = threading.Event()
        self.screen = screen

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block SIGINT and SIGTERM ask for an orderly end."""
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.wanted.is_set():
            raise KeyboardInterrupt
        self.wanted.set()
        self.screen.note("stopping after what is being done; once more to leave at once")


def take_part(place: Place, data: pathlib.Path, screen: Screen) -> None:
    """Take part in a run until it is over. Raises UserError before connecting, RunStopped when the server stays away."""
    problems = Problems()
    own: OwnFile | None = None
    for where, address in (("--server", place.server), ("--health", place.health)):
        with problems.gather():
            if address is not None:
                parsed(address, where)
    with problems.gather():
        key = keys.private_key(place.keys)
    certificates: bytes | None = None
    if not place.insecure:
        with problems.gather():
            certificates = keys.read(place.keys / "ca.crt")
    with problems.gather():
        own = load(data)
    problems.raise_if_any()
    assert own is not None
    if place.insecure:
        screen.note("INSECURE: --insecure was given; nothing is encrypted, and whoever is on the way can read and change it")
    address, stop = joined(*parsed(place.server, "--server")), Stop(screen)
    resident = Resident(own, Folder(place.state), screen)
    connected = False
    with stop.listening(), Health(place.health) as health:
        health.says = lambda: {"connected": connected, "client": resident.client}
        resident.recall()
        heard, refused, pause = time.monotonic(), None, AGAIN_SECONDS[0]  # when a server was last there, when it first refused us
        unwanted: float | None = None  # since when the answer at hand is refused by a server that has let us in
        while resident.over is None and not stop.wanted.is_set():
            fleet = Fleet(address, certificates, key)
            try:
                idle = resident.folder.read("inbox") is None
                resident.folder.node = fleet.activate(register=place.insecure, known=resident.folder.node, idle=idle)
                screen.note(f"connected to {address}")
                connected, refused, pause = True, None, AGAIN_SECONDS[0]
                unwanted = None if idle else unwanted
                with _beating(fleet):
                    _answer_all(fleet, resident, stop)
                fleet.leave()
            except Disconnected as error:
                fleet.close()
                if connected or pause == AGAIN_SECONDS[0]:
                    screen.note(f"the connection to {address} is lost; trying again" if connected else f"nobody answers at {address} yet")
                heard = time.monotonic() if connected else heard
                connected = False
                if time.monotonic() - heard > own.patience:
                    raise RunStopped(f"no server at {address} for {own.patience:.0f} s ({error})") from error
                stop.wanted.wait(pause)
                pause = min(2 * pause, AGAIN_SECONDS[1])
            except Refused as error:
                fleet.close()
                if connected:
                    unwanted = unwanted or time.monotonic()
                    if time.monotonic() - unwanted > REFUSED_SECONDS:
                        screen.note(f"the answer at hand is not wanted at {address} ({error}): it belongs to another run, and is dropped")
                        resident.folder.empty()
                    connected = False
                    stop.wanted.wait(AGAIN_SECONDS[0])
                    continue
                refused, connected = refused or time.monotonic(), False
                if time.monotonic() - refused > REFUSED_SECONDS:
                    do = "is this key in the server's clients.yaml, and is --insecure given on both sides or on neither?"
                    raise UserError(Problem("--server", f"{address} refuses this client ({error})", do=do)) from error
                stop.wanted.wait(AGAIN_SECONDS[0])
    if resident.over is not None:
        screen.note(f"the run is over: {resident.over.get('stopped_because', 'finished')}")


def _answer_all(fleet: Fleet, resident: Resident, stop: Stop) -> None:
    """Answer what comes, until the run is over or a stop is asked for."""
    folder = resident.folder
    while True:
        try:
            if (asked := folder.read("inbox")) is None:
                if resident.over is not None or stop.wanted.is_set():
                    return
                if (message := fleet.receive()) is None:
                    stop.wanted.wait(wire.POLL_SECONDS)
                    continue
                asked = flower_private.to_bytes(message)
                folder.put("inbox", asked)
                fleet.confirm(message)
            fleet.send(_reply(flower_private.from_bytes(asked), resident))
        except RunOver:
            resident.screen.note("the server has gone on without this answer")
        folder.empty()
        if stop.wanted.is_set() or resident.over is not None:
            time.sleep(LAST_SECONDS)


def _reply(asked: Message, resident: Resident) -> Message:
    """The answer to a message. One that was on its way when this client was killed is the same to the letter: to the SuperLink
    another answer to the same message would be a second one."""
    kept = resident.folder.read("outbox")
    if kept is None or flower_private.from_bytes(kept).metadata.reply_to_message_id != asked.metadata.message_id:
        kept = flower_private.to_bytes(resident.answer(asked))
        resident.folder.put("outbox", kept)
    return flower_private.from_bytes(kept)


@contextmanager
def _beating(fleet: Fleet) -> Iterator[None]:
    """Tell the SuperLink inside the block that this client is there, whatever it is busy with."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS / 2):
            try:
                fleet.beat()
            except (Disconnected, Refused, RunOver):
                continue  # the calls that matter will find out

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
