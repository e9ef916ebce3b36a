"""`Strategy`: what is sent, how many updates become one, and how the global state moves. Frozen settings, pure functions.

The order of a round, with the file that calls each:

    server/rounds.py     received = arrays          sent to every client of the round
    client/worker.py     upload(trained)            which of the trained tensors travel back
    server/rounds.py     combine(updates, received) many to one
    server/rounds.py     apply(arrays, combined)    the server's step; server optimisers live here
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from fedpeft.lookup import Settings
from fedpeft.records import Arrays, Update


class Strategy(Settings):
    """The interface of every strategy."""

    def start(self, arrays: Arrays) -> Arrays:
        """What the server remembers between rounds besides the global arrays; nothing by default."""
        return {}

    def upload(self, trained: Sequence[str]) -> tuple[str, ...]:
        """Names, out of the trained ones, of the tensors a client sends back; all by default."""
        return tuple(sorted(trained))

    @abstractmethod
    def combine(self, updates: Sequence[Update], received: Arrays) -> Arrays:
        """Many updates, sorted by client, to one set of uploaded tensors. `received` is what the clients started from."""

    def apply(self, arrays: Arrays, combined: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        """The next global arrays and server state; by default what was combined replaces what was there."""
        return {**arrays, **combined}, state
