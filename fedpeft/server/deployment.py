"""`serve`: a federation of real clients, from a config to a run folder. The round loop is the one of every simulation.

RUN/superlink/   Flower's SuperLink: its database and log; `run` names this run to the clients, for good
"""

from __future__ import annotations

import functools
import math
import pathlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft import durable, wire
from fedpeft.addresses import parsed
from fedpeft.config import Config
from fedpeft.data import corpus
from fedpeft.data.encoded import Encoded, digest
from fedpeft.data.examples import Examples
from fedpeft.data.unusable import usable
from fedpeft.errors import Problems
from fedpeft.flower_link import Link, public_key_bytes
from fedpeft.flower_private import RunOver
from fedpeft.health import Health
from fedpeft.keys import Listed, listed, private, read
from fedpeft.quiet import quiet_libraries
from fedpeft.records import Arrays
from fedpeft.screen import Screen
from fedpeft.server import rounds, samples, sampling
from fedpeft.server.ending import end
from fedpeft.server.federation import Outcome
from fedpeft.server.making import check_global, make
from fedpeft.server.roster import Roster, task
from fedpeft.server.run_folder import RunFolder
from fedpeft.server.superlink import SuperLink
from fedpeft.training import prepare
from fedpeft.training.prepare import Prepared

MANIFEST_BYTES = 2**24  # for names, shapes and metrics


@dataclass(frozen=True)
class Site:
    """Where a server listens, and with what it proves who it is."""

    address: str  # HOST:PORT, for the clients
    keys: pathlib.Path  # as `fedpeft keys` made it
    insecure: bool = False  # no TLS; clients are still told apart by their keys, but nothing stops who reads along
    health: str | None = None  # HOST:PORT of a health endpoint


@dataclass(frozen=True)
class Parts:
    """The server's own half of a federation, loaded."""

    ready: Prepared
    examples: Examples  # of the test part
    test: Encoded  # the same without those that cannot be used
    label_names: tuple[str, ...]
    clients: list[Listed]
    ranks: dict[int, int]

    @property
    def expected(self) -> int:
        """How many clients may take part."""
        return sum(not one.revoked for one in self.clients)


def serve(config: Config, site: Site, out: pathlib.Path, resume: bool, screen: Screen) -> dict[str, Any]:
    """Run the federation of `config` with the clients that come to `site`; the summary. Raises UserError and RunStopped.

    With `resume` the run in `out` is continued, or started where there is none: a supervisor can use one command for both.
    """
    folder = RunFolder(out)
    resume = resume and folder.config.is_file()
    if resume:
        folder.reopen(config)
    with quiet_libraries():
        parts = _assemble(config, site, None if resume else folder)
        if not resume:
            folder.create(config)
        if site.insecure:
            screen.note("INSECURE: --insecure was given; nothing is encrypted, and whoever is on the way can read and change it")
        certificates = None if site.insecure else read(site.keys / "ca.crt")
        place = out / "superlink"
        with Health(site.health) as health, SuperLink(place, site.address, None if site.insecure else site.keys, screen.note) as superlink:
            link = Link(superlink.http_address, certificates)
            if not site.insecure:
                _let_in(link, parts.clients)
            screen.started(config, _facts(parts, folder))
            screen.note(f"waiting at {site.address} for {config.strategy.min_available_nodes} of {parts.expected} clients")
            while True:
                try:
                    with link.run(_largest_reply(parts)) as grid:
                        roster = Roster(link, grid, parts.clients, _task(config, parts, place), screen)
                        health.says = functools.partial(_state, roster, folder)
                        return _play(config, parts, roster, folder, screen)
                except RunOver as lost:
                    screen.note(f"{lost}; going on after the last whole round")


def _play(config: Config, parts: Parts, roster: Roster, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    federation = make(config, parts.ready, parts.test, digest([parts.test]), roster, parts.expected, parts.ranks, folder.ledger)
    keep = functools.partial(samples.keep, folder, parts.ready.task, parts.ready.adapted, examples=parts.examples, data=config.data)
    keep("before", federation.arrays)
    while len(roster()) < config.strategy.min_available_nodes:  # however long they take to come; later a round has its timeout
        time.sleep(wire.POLL_SECONDS)
    outcome: Outcome = rounds.run(federation, roster.grid, folder, screen)
    keep("after", outcome.arrays)
    summary = end(federation, outcome, parts.ready.adapted, parts.label_names, folder, samples.scores(folder))
    roster.dismiss(summary)
    screen.finished(summary, folder.path)
    return summary


def _assemble(config: Config, site: Site, fresh: RunFolder | None) -> Parts:
    """Load test data, model and adapter, after every problem of the input was looked for."""
    task_of, problems = config.model.build(), Problems()
    clients: list[Listed] = []
    test: Examples | None = None
    for address, where in ((site.address, "--address"), (site.health, "--health")):
        with problems.gather():
            if address is not None:
                parsed(address, where)
    with problems.gather():
        clients = listed(site.keys)
        if not site.insecure:
            for name in ("ca.crt", "server.crt"):
                read(site.keys / name)
            private(site.keys / "server.key")
    if fresh is not None:
        with problems.gather():
            fresh.check_free()
    with problems.gather():
        test = corpus.held_by_server(config.data, task_of, config.seed)
    labels = test.label_names if test else ("", "")
    prepare.check(config, len(labels), problems)
    if clients:
        sampling.check(config, config.strategy.build(), sum(not one.revoked for one in clients), problems)
    check_global(config, problems)
    problems.raise_if_any()
    assert test is not None
    ready = prepare.prepare(config, len(labels))
    ranks = config.adapter.build().ranks([one.name for one in clients], config.seed)
    encoded = task_of.encode(test, ready.adapted.base, config.data)
    kept = np.setdiff1d(np.arange(len(encoded)), sorted(encoded.left_out))
    usable_test = usable(encoded.usable(), "the server", test, encoded)
    return Parts(ready, test.take(kept), usable_test, labels, clients, {clients[place].client: rank for place, rank in ranks.items()})


def _let_in(link: Link, clients: Sequence[Listed]) -> None:
    """Register the keys that may take part with the SuperLink, and shut out all others."""
    wanted = {public_key_bytes(one.key): one.name for one in clients if not one.revoked}
    there = {facts.public_key: facts.node for facts in link.nodes()}
    for key in there.keys() - wanted.keys():
        link.unregister(there[key])
    for key, name in wanted.items():
        if key not in there:
            link.register(key, name)


def _task(config: Config, parts: Parts, place: pathlib.Path) -> Arrays:
    """What the clients are told, under the name that this run keeps when it is resumed."""
    name = place / "run"
    if not name.exists():
        durable.replace(name, uuid.uuid4().hex.encode())
    return task(config, name.read_text(), parts.label_names, parts.expected)


def _largest_reply(parts: Parts) -> int:
    """Bytes that no honest reply exceeds: what a survey asks for, or four times the adapter and head (sketches, control variates)."""
    adapter = sum(int(array.nbytes) for array in parts.ready.adapted.read().values())
    surveys = [survey.expects(parts.ready.adapted.layout()) for survey in parts.ready.surveys.values()]
    asked = [sum(8 * int(math.prod(spec.shape)) for spec in specs.values()) for specs in surveys]
    return max(4 * adapter, *asked, 0) + MANIFEST_BYTES


def _facts(parts: Parts, folder: RunFolder) -> dict[str, Any]:
    return {
        "clients": parts.expected,
        "train_examples": None,
        "test_examples": len(parts.test),
        "trainable_parameters": parts.ready.adapted.trainable_parameters,
        "base_parameters": parts.ready.adapted.base_parameters,
        "primary_metric": parts.ready.task.primary_metric,
        "out": str(folder.path),
    }


def _state(roster: Roster, folder: RunFolder) -> dict[str, Any]:
    """What the health endpoint says."""
    played = len(folder.rounds.read_bytes().splitlines()) - 1 if folder.rounds.is_file() else -1
    return {"clients": [roster.names[client] for client in roster.present], "rounds_completed": max(played, 0), "started": played >= 0}
