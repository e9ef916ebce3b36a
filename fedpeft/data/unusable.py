"""Rows that a run does without: they are counted, the first is named, and a client that has nothing left is an error."""

from __future__ import annotations

from collections.abc import Iterator

from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, UserError
from fedpeft.sections import DataSection


def usable(mine: Encoded, whose: str, examples: Examples, encoded: Encoded) -> Encoded:
    """`mine`, some of `encoded`. Raises UserError when nothing of it can be used, with what is wrong with one of the rows."""
    if not len(mine):
        got = f"no example of {whose} can be used: {_first(examples, encoded)}"
        raise UserError(Problem("data", got, do="mend the rows, or raise data.max_length"))
    return mine


def skipped(which: str, examples: Examples, encoded: Encoded, data: DataSection) -> Iterator[str]:
    """What is to be said of the rows of a split that were skipped or cut; nothing where there are none."""
    if examples.skipped:
        yield f"rows that hold nothing were skipped: {examples.skipped[0]}{_more(len(examples.skipped))}"
    if encoded.left_out:
        yield f"{len(encoded.left_out)} of {len(encoded)} {which} examples were skipped: {_first(examples, encoded)}"
    if encoded.truncated:
        yield f"{encoded.truncated} of {len(encoded)} {which} texts lost their end to data.max_length={data.max_length}"


def _first(examples: Examples, encoded: Encoded) -> str:
    place, reason = min(encoded.left_out.items())
    row = place + 1 if examples.rows is None else examples.rows[place]
    return f"row {row}: {reason}{_more(len(encoded.left_out))}"


def _more(count: int) -> str:
    return f", and {count - 1} more" if count > 1 else ""
