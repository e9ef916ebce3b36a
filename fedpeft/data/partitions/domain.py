"""domain: a column of the data says where a row comes from; no client has rows of two domains."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import numpy as np
from pydantic import Field

from fedpeft.data.examples import Examples, Indices
from fedpeft.data.partitions import Movable, needed
from fedpeft.data.partitions.dirichlet import dirichlet
from fedpeft.data.partitions.iid import iid
from fedpeft.errors import Problem, UserError


def domain(
    examples: Examples,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: Annotated[
        float | None, Field(ge=1e-6, le=1e6, description="Dirichlet label skew among the clients of a domain; null: none (iid)")
    ] = None,
    split: Annotated[
        dict[str, int] | None, Field(description="domains dealt to several clients, {domain: clients}; every other is one client")
    ] = None,
) -> list[Indices]:
    """Every domain has its own clients: clients // domains each, and one more for the largest domains while any are left.

    With `split`, the domains named there have so many clients and the others one each: the number of clients follows.

    Clients are numbered domain after domain, in the order of their names. Examples that have to move to meet
    `partition.min_examples` stay in their domain.

    Raises UserError when there are fewer clients than domains, and when `split` names none or does not come to `clients`.
    """
    domains = needed(examples.domains, "domain", "domain")
    sizes = Counter(domains)
    if split is not None:
        _check_split(split, sizes, clients)
    if clients < len(sizes):
        got = f"{clients} clients, and data.columns.domain names {len(sizes)} domains"
        raise UserError(Problem("partition.clients", got, f"at least {len(sizes)}", "raise it, or use data with fewer domains"))
    each, left = divmod(clients, len(sizes))
    more = sorted(sizes, key=lambda name: (-sizes[name], name))[:left]
    names = np.array(domains)
    parts: list[Indices] = []
    groups: list[int] = []
    for group, name in enumerate(sorted(sizes)):
        rows = np.flatnonzero(names == name)
        count = each + (name in more) if split is None else split.get(name, 1)
        inside = examples.take(rows)
        own = iid(inside, count, generator) if alpha is None else dirichlet(inside, count, generator, alpha=alpha)
        parts += [rows[part] for part in own]
        groups += [group] * count
    return Movable(parts, groups)


def _check_split(split: dict[str, int], sizes: Counter[str], clients: int) -> None:
    if strangers := sorted(split.keys() - sizes.keys()):
        raise UserError(Problem("partition.split", f"there is no domain {strangers[0]}", ", ".join(sorted(sizes))))
    if few := [name for name, count in split.items() if count < 1]:
        raise UserError(Problem("partition.split", f"{few[0]} has {split[few[0]]} clients", "at least 1"))
    if (wanted := sum(split.get(name, 1) for name in sizes)) != clients:
        got = f"{clients} clients, and partition.split comes to {wanted}"
        raise UserError(Problem("partition.clients", got, str(wanted), "set partition.clients to it"))
