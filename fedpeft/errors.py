"""Every error a person may meet, and how it is said: got what, allowed what, from where, what to do.

    FedpeftError            anything fedpeft raises on purpose                    exit code 1
    |-- UserError           input a person can mend; carries every problem found  exit code 2
    |-- RunStopped          the run cannot go on; what was finished is kept       exit code 1

A client that misbehaves is not an exception: it is a `Failure` record (`records.py`), and the round goes on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong with what a person gave us, sayable in one line."""

    where: str  # the config key, file and row, or option it came from
    got: str
    allowed: str = ""
    do: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.got}"]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.do:
            parts.append(self.do)
        return "; ".join(part.replace("\n", " ") for part in parts)


class FedpeftError(Exception):
    """The root of all errors that fedpeft raises on purpose."""

    exit_code = 1


class UserError(FedpeftError, ValueError):
    """Input that a person can mend. Holds all the problems found, not only the first."""

    exit_code = 2

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class RunStopped(FedpeftError):
    """The run cannot go on; the last completed round is kept and can be resumed."""


class Problems:
    """A list that fills up while input is checked, and is raised once at the end."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, where: str, got: str, allowed: str = "", do: str = "") -> None:
        """Note one problem and go on."""
        self.found.append(Problem(where, got, allowed, do))

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keep what a check complains of, and go on to the next check."""
        try:
            yield
        except UserError as error:
            self.found.extend(error.problems)

    def raise_if_any(self) -> None:
        """Raise one UserError with everything found."""
        if self.found:
            raise UserError(*self.found)


def nearest(name: str, known: Iterable[str]) -> str:
    """'did you mean "x"?' for the closest known name, or nothing when none is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else ""
