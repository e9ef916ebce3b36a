"""natural: a column of the data says whose row it is; nothing is drawn."""

from __future__ import annotations

import heapq

import numpy as np

from fedpeft.data.examples import Examples, Indices
from fedpeft.data.partitions import needed
from fedpeft.errors import Problem, UserError


def natural(examples: Examples, clients: int | None, generator: np.random.Generator) -> list[Indices]:
    """Every owner's rows stay together: a client is an owner (sorted by name), or several when there are fewer clients.

    Several: owners are dealt whole, the largest first, each to the client with the fewest rows so far.

    Raises UserError when there are more clients than owners.
    """
    owners: dict[str, list[int]] = {}
    for row, owner in enumerate(needed(examples.clients, "client", "natural")):
        owners.setdefault(owner, []).append(row)
    held = [np.array(owners[owner], dtype=np.int64) for owner in sorted(owners)]
    if clients is None or clients == len(held):
        return held
    if clients > len(held):
        got = f"{clients} clients, and data.columns.client names {len(held)} owners"
        raise UserError(Problem("partition.clients", got, f"at most {len(held)}, or null for a client an owner", "lower it"))
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    loads = [(0, client) for client in range(clients)]  # a heap of (rows so far, client)
    for rows in sorted(held, key=len, reverse=True):  # stable: equal sizes stay in the order of their names
        load, client = heapq.heappop(loads)
        parts[client].append(rows)
        heapq.heappush(loads, (load + len(rows), client))
    return [np.sort(np.concatenate(part)) for part in parts]
