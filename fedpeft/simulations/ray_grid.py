"""`RayGrid`: simulated clients in Ray's actors, on several GPUs or several machines. Each actor trains a cohort at a time.

An actor holds what every process of a run loads for the same config (base, adapter, data) and no state: what clients remember, what
was sent to them but once and what their ledgers hold stays with the worker of this process, travels with the cohort, and what
has become of it comes back. So any actor can train any client, an actor that dies costs nothing but time, and a checkpoint is
that of a run in one process. Results are the same too: bit for bit with engine `one` on as many threads an actor, to rounding
with `many`, whose cohorts are others.

Why not the backend of Flower's own simulation (flwr 1.39): it hands an actor one message of one client, at most CPU count + 4 at
a time, and costs 4 to 11 ms a message, so that no cohort could form; an actor that was killed goes back into its pool, where every
later message fails; the round loop would have to live in its thread. `flwr run flower-app` is the way there (flower_app.py).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import socket
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error, Message

from fedpeft import arrays as arithmetic
from fedpeft import environment, flower_private, wire
from fedpeft.addresses import parsed
from fedpeft.client.worker import Worker
from fedpeft.config import Config
from fedpeft.errors import Problem, RunStopped, UserError
from fedpeft.privacy.accounting import History
from fedpeft.records import Arrays, Assignment
from fedpeft.simulations.grid import CLIENT_RAISED, RUN_ID, LocalGrid, answers

ATTEMPTS = 3  # actors that may die over a cohort before its clients count as failed
CONNECT_SECONDS = 5.0  # to a cluster that runs
AHEAD = 2  # cohorts an actor: one that it trains, one that waits for it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """What the clients of a cohort bring along and take home."""

    memory: Mapping[int, Arrays]  # what the strategy remembers at each client
    histories: Mapping[int, History] = field(default_factory=dict)  # what each has released so far, where there is privacy


@dataclass
class Cohort:
    """Messages that go to one actor together."""

    messages: list[Message]
    assignments: list[Assignment]
    deaths: int = 0


class Actor:
    """In a process of Ray's: the worker of the run's config."""

    def __init__(self, settings: dict[str, Any]) -> None:
        environment.prepare()
        from fedpeft.quiet import quiet_libraries
        from fedpeft.simulations.assemble import assemble

        flower_private.take_identity(RUN_ID)
        self.said: list[str] = []
        logging.getLogger("fedpeft").addHandler(Listener(self.said))
        with quiet_libraries():
            self.worker = assemble(Config.from_dict(settings)).worker

    def base(self) -> str:
        """The fingerprint of what was loaded."""
        return self.worker.base

    def answer(self, data: list[bytes], kept: Arrays, state: State) -> tuple[list[bytes], State, list[str]]:
        """The replies to a cohort's messages, what its clients remember now, and what was said in the log."""
        from fedpeft.quiet import quiet_libraries

        worker = self.worker
        worker.kept, worker.memory = dict(kept), {client: dict(memory) for client, memory in state.memory.items()}
        for client, history in state.histories.items():
            worker.guards[client].ledger.history = history
        with quiet_libraries():
            replies = [flower_private.to_bytes(reply) for reply in answers(worker, [flower_private.from_bytes(one) for one in data])]
        said, self.said[:] = list(self.said), []
        return replies, State(worker.memory), said


class Listener(logging.Handler):
    """Keeps what is said in an actor's log, for the process of the run to say."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        """The message alone."""
        self.said.append(record.getMessage())


def check() -> None:
    """Raises UserError when there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        do = 'install it (pip install "flwr[simulation]==1.39.*"), or set simulation.engine=in-process'
        raise UserError(Problem("simulation.engine", '"ray" is asked for, and Ray is not installed', "in-process", do))


class RayGrid(LocalGrid):
    """Clients in Ray's actors, which live as long as the block `with RayGrid(worker) as grid`."""

    check = staticmethod(check)

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        check()
        self._actors: list[Any] = []  # those that wait for work
        self._running: dict[Any, tuple[Any, Cohort]] = {}  # promise of an answer -> who gives it, to what
        self._waiting: deque[Cohort] = deque()
        self._kept: tuple[str, Any] = ("", None)  # digest of what all clients hold, and where Ray keeps it

    def __enter__(self) -> RayGrid:
        """Start Ray, or join the one at `simulation.address`, and the actors. Raises UserError when they do not fit in."""
        import ray

        section = self.worker.config.simulation
        _answers(section.address)
        self._started = not ray.is_initialized()
        try:
            if self._started:
                found = {"address": section.address} if section.address else {"include_dashboard": False}
                ray.init(**found, logging_level=logging.WARNING, log_to_driver=False, configure_logging=False)
            count, cpus, gpus = _shares(section, ray.cluster_resources())
            self._make = ray.remote(Actor).options(num_cpus=cpus, num_gpus=gpus).remote
            self.count, self.cohorts_at_once = count, AHEAD * count
            self._settings = ray.put(self.worker.config.as_dict())
            self._actors = [self._make(self._settings) for _ in range(count)]
            bases = ray.get([actor.base.remote() for actor in self._actors])
            if other := {base for base in bases if base != self.worker.base}:
                raise RunStopped(f"an actor has loaded another base: {other.pop()}, here {self.worker.base}; are the files the same?")
        except ConnectionError as error:
            raise UserError(_nobody(section.address)) from error
        except ray.exceptions.RayError as error:
            self.__exit__()
            raise RunStopped(f"Ray's actors cannot start: {_reason(error)}") from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *reason: object) -> None:
        """Stop the actors, and Ray if it was started here."""
        import ray

        if ray.is_initialized():
            for actor in [*self._actors, *(actor for actor, _ in self._running.values())]:
                ray.kill(actor)
            if self._started:
                ray.shutdown()
        self._actors, self._running = [], {}
        self._waiting.clear()

    def cohort(self, asked: int) -> int:
        """Of few clients every actor has its share."""
        return min(super().cohort(asked), max(1, math.ceil(asked / self.count)))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to an actor, together. Returns their ids."""
        sent = [flower_private.stamp(message) for message in messages]
        assignments = [wire.message_to_assignment(message)[0] for message in sent]
        for assignment in assignments:
            self.worker.keep(assignment)
        self._waiting.append(Cohort(sent, assignments))
        self._dispatch()
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to the messages with these ids, as far as they are there; waits for one a moment."""
        import ray

        done, _ = ray.wait(list(self._running), timeout=wire.POLL_SECONDS) if self._running else ([], [])
        for promise in done:
            actor, cohort = self._running.pop(promise)
            try:
                replies, state, said = ray.get(promise)
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                self._lost(cohort, _reason(error))
                continue
            self._actors.append(actor)
            for line in said:
                _say(line)
            self.worker.memory |= {client: memory for client, memory in state.memory.items() if memory}
            for reply in map(flower_private.from_bytes, replies):
                self._replies[reply.metadata.reply_to_message_id] = reply
        self._dispatch()
        return super().pull_messages(message_ids)

    def _lost(self, cohort: Cohort, reason: str) -> None:
        """Another actor takes the place of one that died, and the cohort is asked again, but not for ever."""
        cohort.deaths += 1
        log.warning("an actor died over %d clients: %s", len(cohort.messages), reason)
        self._actors.append(self._make(self._settings))
        if cohort.deaths < ATTEMPTS:
            self._waiting.appendleft(cohort)
            return
        for message in cohort.messages:
            reply = Message(Error(CLIENT_RAISED, f"{cohort.deaths} actors died over its cohort, the last: {reason}"), reply_to=message)
            self._replies[message.metadata.message_id] = flower_private.stamp(reply)

    def _dispatch(self) -> None:
        import ray

        while self._waiting and self._actors:
            actor, cohort = self._actors.pop(0), self._waiting.popleft()
            digest = arithmetic.digest(self.worker.kept)
            if digest != self._kept[0]:
                self._kept = digest, ray.put(self.worker.kept)
            clients = sorted({assignment.client for assignment in cohort.assignments})
            state = State({client: self.worker.memory.get(client, {}) for client in clients}, self._charged(cohort))
            data = [flower_private.to_bytes(message) for message in cohort.messages]
            self._running[actor.answer.remote(data, self._kept[1], state)] = actor, cohort

    def _charged(self, cohort: Cohort) -> dict[int, History]:
        """The ledgers before this round, which is charged here and now: on disk before it leaves, again when it is sent again."""
        histories = {}
        for assignment in cohort.assignments:
            if assignment.action == wire.TRAIN and (guard := self.worker.guards.get(assignment.client)) is not None:
                histories[assignment.client] = guard.ledger.history
                if guard.refusal() is None:
                    guard.begin(assignment.round)
        return histories


def _answers(address: str | None) -> None:
    """Raises UserError when nobody answers at HOST:PORT: Ray itself would try for ten minutes."""
    if address is None or address == "auto":
        return
    host, port = parsed(address, "simulation.address")
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(_nobody(address)) from error


def _nobody(address: str | None) -> Problem:
    do = "start one (ray start --head), or leave simulation.address out"
    return Problem("simulation.address", f"no Ray cluster answers at {address}", '"auto" or HOST:PORT', do)


def _shares(section: Any, there: Mapping[str, float]) -> tuple[int, float, float]:
    """How many actors, and the CPUs and GPUs of each. Raises UserError for more than the cluster has: Ray would wait for ever."""
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    each = section.cpus_per_actor
    count = section.actors or max(1, int(min(gpus, cpus / each)) if gpus else int(cpus / each))
    share = section.gpus_per_actor if section.gpus_per_actor is not None else min(1.0, gpus / count)
    if count * each > cpus:
        got = f"{count} actors with {each:g} CPUs each, and Ray has {cpus:g}"
        raise UserError(Problem("simulation.actors", got, f"at most {int(cpus / each)}", "lower it, or simulation.cpus_per_actor"))
    if count * share > gpus:
        got = f"{count} actors with {share:g} GPUs each, and Ray has {gpus:g}"
        raise UserError(Problem("simulation.gpus_per_actor", got, f"at most {gpus / count:g}", "lower it, or simulation.actors"))
    return count, each, share


def _reason(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if "Traceback" in lines[0:1] else 0][:300]


@functools.cache
def _say(line: str) -> None:
    log.warning("%s", line)
