"""What a client remembers of the last rounds, wherever it is kept.

A round may be asked for again, when the server was killed in it. So what a round starts from is the state after an earlier
one, whatever this client did in that round before, and the answer is the same again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpeft.records import Arrays

KEPT = 3  # rounds: a server whose newest checkpoint is torn goes back by two


@dataclass(frozen=True)
class State:
    """A client after its part in a round."""

    memory: Arrays = field(default_factory=dict)  # of the strategy
    kept: Arrays = field(default_factory=dict)  # what is sent but once

    def packed(self) -> Arrays:
        """Both in one, for a file or a message."""
        return {f"memory/{name}": array for name, array in self.memory.items()} | {
            f"kept/{name}": array for name, array in self.kept.items()
        }

    @classmethod
    def unpacked(cls, arrays: Arrays) -> State:
        """What `packed` gave. Raises ValueError."""
        parts: dict[str, Arrays] = {"memory": {}, "kept": {}}
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            if part not in parts:
                raise ValueError(f"{key} belongs to no state")
            parts[part][name] = array
        return cls(parts["memory"], parts["kept"])


@dataclass
class Rounds:
    """The states after the last rounds."""

    states: dict[int, State] = field(default_factory=dict)

    def before(self, round: int) -> State:
        """What was remembered before `round`."""
        return self.states.get(max((known for known in self.states if known < round), default=-1), State())

    def after(self, round: int) -> State:
        """What was remembered in `round`, for a second question; before it, when the round is not known."""
        return self.states.get(round) or self.before(round)

    def put(self, round: int, state: State) -> None:
        """Remember; rounds after `round` are forgotten, as they are to be played again."""
        self.states = {known: kept for known, kept in self.states.items() if known < round} | {round: state}
        for known in sorted(self.states)[:-KEPT]:
            del self.states[known]
