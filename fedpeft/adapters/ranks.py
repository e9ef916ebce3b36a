"""Ranks that differ between clients, as `adapter.r` gives them.

r: 8                                          all clients alike
r: [4, 8, 16]                                 client k has the entry k mod 3
r: {4: 0.75, 16: 0.25}                        so many of the clients, dealt out by the seed
r: {clients: {hospital-a: 16, 3: 8}, rest: 4} by name or number
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from fedpeft import seeds
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings

Rank = Annotated[int, Field(ge=1)]
Shares = dict[Rank, Annotated[float, Field(gt=0)]]


class Named(Settings):
    """A rank for each client that is named, and one for the rest."""

    clients: dict[str | int, Rank] = Field(description="client name or number -> rank")
    rest: Rank = Field(description="rank of every other client")


def _in_one_sentence(given: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """One complaint instead of one for each form that a rank may have."""
    try:
        return check(given)
    except ValidationError as error:
        forms = "a valid integer of 1 or more, a list of such, shares {rank: share}, or {clients: {name: rank}, rest: rank}"
        raise PydanticCustomError("ranks", "input should be {forms}", {"forms": forms}) from error


Ranks = Annotated[
    Rank | Annotated[list[Rank], Field(min_length=1)] | Named | Annotated[Shares, Field(min_length=1)], WrapValidator(_in_one_sentence)
]


def highest(ranks: Ranks) -> int:
    """The rank of the global adapter: the largest that a client may have."""
    if isinstance(ranks, Named):
        return max(ranks.rest, *ranks.clients.values())
    return ranks if isinstance(ranks, int) else max(ranks)


def deal(ranks: Ranks, names: Sequence[str], seed: int) -> list[int]:
    """The rank of each client of `names`. Raises UserError for a client that is not among them."""
    if isinstance(ranks, int):
        return [ranks] * len(names)
    if isinstance(ranks, Named):
        return _by_name(ranks, names)
    if isinstance(ranks, Mapping):
        return _by_share(ranks, len(names), seed)
    return [ranks[client % len(ranks)] for client in range(len(names))]


def _by_name(ranks: Named, names: Sequence[str]) -> list[int]:
    numbers: dict[str | int, int] = {**{name: number for number, name in enumerate(names)}, **dict(enumerate(range(len(names))))}
    strangers = [name for name in ranks.clients if name not in numbers]
    if strangers:
        raise UserError(Problem("adapter.r", f"there is no client {strangers[0]!r}", f"a number below {len(names)}, or its name"))
    dealt = [ranks.rest] * len(names)
    for name, r in ranks.clients.items():
        dealt[numbers[name]] = r
    return dealt


def _by_share(shares: Mapping[int, float], clients: int, seed: int) -> list[int]:
    """Largest remainders, so that the counts come as near to the shares as whole clients can; then a seeded shuffle."""
    wanted = {r: share / sum(shares.values()) * clients for r, share in sorted(shares.items())}
    counts = {r: int(exact) for r, exact in wanted.items()}
    for r in sorted(wanted, key=lambda r: counts[r] - wanted[r])[: clients - sum(counts.values())]:
        counts[r] += 1
    dealt = np.repeat(list(counts), list(counts.values()))
    return [int(r) for r in seeds.generator(seed, "ranks").permutation(dealt)]
