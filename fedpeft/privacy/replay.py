"""Whether a ledger remembers: rounds are charged to one, as a run that is restarted does, and its file is read by somebody else."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator

from fedpeft.errors import UserError
from fedpeft.privacy import recount
from fedpeft.privacy.accounting import Release, epsilon
from fedpeft.privacy.conformance import Check
from fedpeft.privacy.ledger import Ledger

ROUNDS = (1, 2, 2, 3)  # one is played twice: it is two releases
TOLERANCE = (0.03, 0.02)  # absolute and relative, between two ways to compute an epsilon


def check(path: pathlib.Path, charge: Callable[[int], object], release: Release, delta: float) -> list[Check]:
    """`charge` charges a round to the ledger at `path`, which is opened anew for it; `release` is what a round costs."""
    on_disk = []
    for round in ROUNDS:
        charge(round)
        on_disk.append(len(recount.read(path)[0]) if path.exists() else 0)
    found, broken = recount.read(path)
    steps, wanted = sum(one.steps for one in found), len(ROUNDS) * release.steps
    kept = on_disk == list(range(1, len(ROUNDS) + 1)) and broken is None and found == [release] * len(ROUNDS)
    claimed, again = epsilon(Ledger(path).history, delta), recount.epsilon([release] * len(ROUNDS), delta)
    near = abs(claimed - again) <= TOLERANCE[0] + TOLERANCE[1] * again
    missed = [edit for edit, changed in _edits(path.read_bytes().splitlines(keepends=True)) if not _noticed(path, changed)]
    return [
        Check("every round is on disk before it is released", kept, f"{steps} of {wanted} steps after {len(ROUNDS)} restarts"),
        Check("the ledger's epsilon is found in another way", near, f"{claimed:.4f}, recomputed {again:.4f}"),
        Check(
            "an edited ledger is refused",
            not missed,
            f"unnoticed: {', '.join(missed)}" if missed else "a line changed, dropped, or swapped",
        ),
    ]


def _edits(lines: list[bytes]) -> Iterator[tuple[str, bytes]]:
    if len(lines) > 1:
        yield "a line changed", b"".join([json.dumps({**json.loads(lines[0]), "steps": 0}).encode() + b"\n", *lines[1:]])
        yield "a line dropped", b"".join(lines[1:])
        yield "two lines swapped", b"".join([lines[1], lines[0], *lines[2:]])


def _noticed(path: pathlib.Path, changed: bytes) -> bool:
    other = path.with_suffix(".edited")
    other.write_bytes(changed)
    try:
        Ledger(other)
    except UserError:
        return True
    finally:
        other.unlink()
    return False
