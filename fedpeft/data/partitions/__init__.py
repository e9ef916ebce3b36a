"""How examples are split over clients, before round 1: the draw, its minimum, and what it came to in numbers.

A partitioner is one function in a file here (or the user's own): `(examples, clients, generator, *, settings) ->
list[Indices]`, one sorted index array a client. `split` calls the one that the config names and keeps its promises:
each example at exactly one client, nobody below `partition.min_examples`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from fedpeft.data.examples import Examples, Indices
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import find
from fedpeft.sections import PartitionSection

DEFAULT_CLIENTS = 10
DRAWS = 20  # a draw that meets the minimum one time in five is found with probability 0.99
NAMED_CLASSES = 12  # more classes than this have no columns of their own in a table

Column = TypeVar("Column")


@dataclass(frozen=True)
class Partition:
    """Who holds which rows."""

    indices: tuple[Indices, ...]  # [clients], sorted
    names: tuple[str, ...]  # [clients], the owner where each client is exactly one owner, else "0", "1", ...
    moved: int = 0  # examples moved after the draw to bring every client to the minimum


class Movable(list[Indices]):
    """Parts drawn from a distribution: the partitioner allows that examples move between clients of the same group."""

    def __init__(self, parts: Iterable[Indices], groups: Sequence[int] | None = None) -> None:
        super().__init__(parts)
        self.groups = [0] * len(self) if groups is None else list(groups)


def split(section: PartitionSection, examples: Examples, generator: np.random.Generator) -> Partition:
    """Deal every example to exactly one client, as the config's section says.

    The minimum: a draw with a client below `min_examples` is drawn again, up to 20 times in all. If none will do, and the
    partitioner returned `Movable` parts, the last draw is mended: a client that is short takes what it lacks, chosen
    at random, from the largest client of its group, which keeps its own minimum; `Partition.moved` counts them.
    A partitioner whose promise a move would break (shards, natural) returns a plain list, and none of its examples moves.

    Raises UserError when there are more clients than examples, when the minimum cannot be met, or when the user's own
    partitioner loses or doubles a row.
    """
    clients = section.clients
    if clients is None and not _counts_clients(find(section.named["name"], section.name)):
        clients = DEFAULT_CLIENTS
    if clients is not None:
        _check_enough(clients, section.min_examples, len(examples))
    for _ in range(DRAWS):
        before = generator.bit_generator.state
        parts = section.build(examples, clients, generator)
        _check_once(section.name, parts, clients, len(examples))
        if min(map(len, parts)) >= section.min_examples or generator.bit_generator.state == before:  # nothing random: no other draw
            break
    moved = _top_up(parts, section.min_examples, generator) if isinstance(parts, Movable) else 0
    names = _names(parts, examples)
    short = [f"{name} ({len(rows)})" for name, rows in zip(names, parts, strict=True) if len(rows) < section.min_examples]
    if short:
        got = f"{len(short)} of {len(parts)} clients have fewer than {section.min_examples} examples: {', '.join(short[:5])}"
        do = "lower it or partition.clients, or choose a more even partition"
        raise UserError(Problem("partition.min_examples", got + (", ..." if len(short) > 5 else ""), do=do))
    return Partition(tuple(np.sort(np.asarray(rows, dtype=np.int64)) for rows in parts), names, moved)


def needed(values: Column | None, column: str, partitioner: str) -> Column:
    """The column that a partitioner deals by; a UserError when the data has none."""
    if values is None:
        where, got = f"data.columns.{column}", f"the data has no such column, and partition {partitioner} deals by it"
        do = "set it, or choose a partition.name that does without, such as iid"
        raise UserError(Problem(where, got, "the name of a column that every row has", do))
    return values


def label_counts(partition: Partition, examples: Examples) -> NDArray[np.int64]:
    """Examples of each class at each client [clients, classes]; data without labels counts as one class."""
    labels = np.zeros(len(examples), dtype=np.int64) if examples.labels is None else examples.labels
    classes = max(len(examples.label_names), int(labels.max(initial=0)) + 1)
    return np.stack([np.bincount(labels[rows], minlength=classes) for rows in partition.indices])


def table(partition: Partition, examples: Examples) -> tuple[list[str], list[list[str]], dict[str, float]]:
    """What a person reads of a split: the header, one row a client, and the measures of the whole.

    `mean_total_variation` is the mean over clients of sum_c |p_client(c) - p_all(c)| / 2: 0 when all look like the whole.
    """
    counts = label_counts(partition, examples)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # [clients, classes]
    names = (*examples.label_names, "none")[: counts.shape[1]] if examples.label_names else tuple(map(str, range(counts.shape[1])))
    few = len(names) <= NAMED_CLASSES
    rows = []
    for name, count, share in zip(partition.names, counts, shares, strict=True):
        cells = [str(number) for number in count] if few else [_largest(count, names)]
        rows.append([name, str(count.sum()), *cells, f"{share.max():.2f}"])
    distance = np.abs(shares - counts.sum(axis=0) / max(counts.sum(), 1)).sum(axis=1) / 2
    sizes = counts.sum(axis=1)
    measures = {
        "clients": len(counts),
        "examples": int(sizes.sum()),
        "smallest_client": int(sizes.min()),
        "largest_client": int(sizes.max()),
        "mean_total_variation": float(distance.mean()),
        "moved_examples": partition.moved,
    }
    return ["client", "examples", *(names if few else ["classes"]), "largest share"], rows, measures


def _largest(count: NDArray[np.int64], names: Sequence[str], shown: int = 3) -> str:
    """The largest classes of a client in words: "card 12, fee 9, pin 3, 4 more"."""
    order = [label for label in np.argsort(-count, kind="stable") if count[label]]
    more = [f"{len(order) - shown} more"] if len(order) > shown else []
    return ", ".join([f"{names[label]} {count[label]}" for label in order[:shown]] + more)


def _counts_clients(partitioner: Callable[..., Any]) -> bool:
    """Whether the partitioner finds the number of clients in the data: it declares `clients: int | None`."""
    parameters = list(inspect.signature(partitioner, eval_str=True).parameters.values())
    return len(parameters) > 1 and type(None) in get_args(parameters[1].annotation)


def _check_enough(clients: int, minimum: int, examples: int) -> None:
    if clients > examples:
        got = f"{clients} clients cannot share {examples} examples"
        raise UserError(Problem("partition.clients", got, f"at most {examples}", "lower it, or give more examples"))
    if clients * minimum > examples:
        got = f"{minimum} for each of {clients} clients is more than the {examples} examples there are"
        raise UserError(Problem("partition.min_examples", got, f"at most {examples // clients}", "lower it or partition.clients"))


def _check_once(name: str, parts: Sequence[Indices], clients: int | None, examples: int) -> None:
    """Each example exactly once. Of ours this holds (the tests say so); a user's own partitioner may err."""
    rows = np.sort(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])) if len(parts) else np.empty(0)
    if (clients is not None and len(parts) != clients) or not np.array_equal(rows, np.arange(examples)):
        got = f'"{name}" gave {len(parts)} clients {len(rows)} rows, {len(np.unique(rows))} of them different'
        allowed = f"{'any number of' if clients is None else clients} clients that share the {examples} rows, each row once"
        raise UserError(Problem("partition.name", got, allowed, "mend the partitioner"))


def _top_up(parts: Movable, minimum: int, generator: np.random.Generator) -> int:
    """Move examples from the largest clients of a group to its short ones, as far as that goes; how many were moved."""
    moved = 0
    for client, group in enumerate(parts.groups):
        while (short := minimum - len(parts[client])) > 0:
            giver = max((other for other in range(len(parts)) if parts.groups[other] == group), key=lambda other: len(parts[other]))
            given = min(short, len(parts[giver]) - minimum)
            if given <= 0:
                break
            places = generator.choice(len(parts[giver]), given, replace=False)
            parts[client] = np.sort(np.concatenate([parts[client], parts[giver][places]]))
            parts[giver] = np.delete(parts[giver], places)
            moved += given
    return moved


def _names(parts: Sequence[Indices], examples: Examples) -> tuple[str, ...]:
    if examples.clients is not None:
        owners = [{examples.clients[row] for row in part} for part in parts]
        if all(len(owner) == 1 for owner in owners) and len(set.union(*owners)) == len(parts):
            return tuple(next(iter(owner)) for owner in owners)
    return tuple(str(client) for client in range(len(parts)))
