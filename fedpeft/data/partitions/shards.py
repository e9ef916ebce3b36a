"""shards: the pathological split; every client knows only a few classes.

Paper: McMahan et al. 2017, arXiv:1602.05629 (section 3): sort by label, cut into clients * k equal shards, deal k to each.
We depart from it to keep its promise: there a shard may straddle two classes, so that a client has up to 2k of them.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedpeft.data.examples import Examples, Indices
from fedpeft.data.partitions import needed
from fedpeft.errors import Problem, UserError


def shards(
    examples: Examples,
    clients: int,
    generator: np.random.Generator,
    *,
    classes_per_client: Annotated[int, Field(ge=1, description="the most classes that a client holds")] = 2,
) -> list[Indices]:
    """Cut every class into shards, clients * k in all, and deal every client k shards of different classes.

    A class gets shards in proportion to its size, at least one, so that clients have about equal sizes; its rows are
    divided evenly over its holders, and what is left over goes to those who have least.

    Raises UserError when the clients cannot hold all classes, since the rows of the others would be lost.
    """
    labels = needed(examples.labels, "label", "shards")
    classes, sizes = np.unique(labels, return_counts=True)  # those that occur
    if clients * classes_per_client < len(classes):
        got = f"{clients} clients with {classes_per_client} each cannot hold {len(classes)} classes"
        least = -(-len(classes) // clients)
        raise UserError(Problem("partition.classes_per_client", got, f"at least {least}", "raise it or partition.clients"))
    each = min(classes_per_client, len(classes))
    holders = _holders(sizes, clients, each)
    free = np.full(clients, each)
    parts: list[Indices] = [np.empty(0, dtype=np.int64)] * clients
    for place in generator.permutation(len(classes)):
        # Those with most shards still to come, ties at random: so the last class still finds clients with room for it.
        order = generator.permutation(clients)
        chosen = order[np.argsort(-free[order], kind="stable")][: holders[place]]
        free[chosen] -= 1
        smallest_first = sorted(chosen, key=lambda client: len(parts[client]))
        rows = generator.permutation(np.flatnonzero(labels == classes[place]))
        for client, piece in zip(smallest_first, np.array_split(rows, len(chosen)), strict=True):
            parts[client] = np.sort(np.concatenate([parts[client], piece]))
    return parts


def _holders(sizes: NDArray[np.int64], clients: int, each: int) -> NDArray[np.int64]:
    """How many clients hold each class: one, then shard by shard where shards would stay largest; clients * each in all.

    A class never has more holders than rows, so that no shard is empty and, where rows suffice, no client.
    """
    most = np.minimum(sizes, clients)
    holders = np.ones(len(sizes), dtype=np.int64)
    for _ in range(min(clients * each, int(most.sum())) - len(sizes)):
        holders[np.argmax(np.where(holders < most, sizes / (holders + 1), 0))] += 1
    return holders
