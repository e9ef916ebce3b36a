"""Who is there: which client is at which Flower node, by its key, and whether it has agreed to take part.

A client's number is that of its key in clients.yaml, so it is the same after every reconnection and every restart, of
either side. When a node comes, it is asked to join: it is sent the task (the part of the config that concerns a client, as
JSON), and it is asked for nothing else before it has agreed. The call is cheap and never waits: the round loop makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from fedpeft import wire
from fedpeft.config import Config
from fedpeft.flower_link import Link, public_key_bytes
from fedpeft.keys import Listed
from fedpeft.records import Arrays, Assignment, Update
from fedpeft.screen import Screen
from fedpeft.server.exchange import Exchange

PRIVATE = ("partition", "simulation")  # sections that are the server's own affair
SHARED_DATA = ("max_length", "validation_fraction")  # of the data section; where data lies is each side's own

GOODBYE_SECONDS = 5.0  # for clients to hear that the run is over


@dataclass(frozen=True)
class Visit:
    """A node since it last came."""

    node: int
    since: str


def task(config: Config, run: str, labels: Sequence[str], clients: int) -> Arrays:
    """What a client must know, as the one array of a join message."""
    sections: dict[str, Any] = {name: section for name, section in config.as_dict().items() if name not in PRIVATE}
    sections["data"] = {key: sections["data"][key] for key in SHARED_DATA}
    said = {"run": run, "config": sections, "labels": list(labels), "clients": clients}
    return {"task": np.frombuffer(json.dumps(said).encode(), np.uint8)}


class Roster:
    """Calling it gives client -> node of those that are there and have agreed."""

    def __init__(self, link: Link, grid: Grid, listed: Sequence[Listed], task: Arrays, screen: Screen) -> None:
        self.link = link
        self.grid = grid
        self.names = {one.client: one.name for one in listed}
        self.task = task
        self.screen = screen
        self.present: list[int] = []  # as last seen, for who only looks
        self._clients = {public_key_bytes(one.key): one.client for one in listed if not one.revoked}
        self._asked: dict[int, Visit] = {}  # client -> the visit in which it was asked to join
        self._agreed: dict[int, Visit] = {}
        self._pending: dict[str, int] = {}  # message -> client

    def __call__(self) -> dict[int, int]:
        """Look who is there, ask those who have come, and hear who agrees."""
        there = self._there()
        for client in sorted(self._agreed.keys() - there.keys()):
            self.screen.note(f"{self.names[client]} (client {client}) has gone")
            del self._agreed[client]
        if self._pending:
            for message in self.grid.pull_messages(sorted(self._pending)):
                client = self._pending.pop(message.metadata.reply_to_message_id)
                self._hear(client, message, there)
        # Only now those who have come: one that left and is back is away for one call at least, so that its message is not waited for.
        come = {client: visit for client, visit in there.items() if self._asked.get(client) != visit}
        for client, visit in sorted(come.items()):
            self._agreed.pop(client, None)
            asked = Assignment(wire.JOIN, 0, client, self.task)
            for message_id in self.grid.push_messages([wire.assignment_to_message(asked, "", visit.node)]):
                if message_id:
                    self._pending[message_id] = client
                    self._asked[client] = visit
        self.present = sorted(self._agreed)
        return {client: self._agreed[client].node for client in self.present}

    def dismiss(self, summary: Mapping[str, Any]) -> None:
        """Tell everybody that the run is over."""
        said: Arrays = {"summary": np.frombuffer(json.dumps(summary).encode(), np.uint8)}
        nodes = {client: visit.node for client, visit in self._there().items()}
        goodbyes = [Assignment(wire.END, 0, client, said) for client in nodes]
        for _ in Exchange(self.grid, goodbyes, nodes, "", GOODBYE_SECONDS).replies:  # they are asked while this is read
            pass

    def _there(self) -> dict[int, Visit]:
        """The visits of nodes that are online and whose key is listed."""
        online = [facts for facts in self.link.nodes() if facts.online and facts.public_key in self._clients]
        return {self._clients[facts.public_key]: Visit(facts.node, facts.activated) for facts in online}

    def _hear(self, client: int, message: Any, there: Mapping[int, Visit]) -> None:
        who, reason = f"{self.names[client]} (client {client})", ""
        if message.has_error():
            self._asked.pop(client, None)  # it went while it was asked: it is asked again when it comes back
            return
        try:
            answer, _ = wire.message_to_answer(message)
            if isinstance(answer, Update):
                if client in there and self._asked.get(client) == there[client]:
                    self._agreed[client] = there[client]
                    self.screen.note(f"{who} takes part with {answer.examples:,} examples")
                return
            reason = answer.reason
        except wire.WireError as error:
            reason = f"malformed: {error}"
        self.screen.note(f"{who} does not take part: {reason}")
