"""From a config to the parts of a federation, every problem of the input found before anything is trained."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapter import Adapter
from fedpeft.client.node import Node
from fedpeft.client.worker import Worker
from fedpeft.config import Config
from fedpeft.data import corpus, partitions
from fedpeft.data.corpus import Corpus
from fedpeft.data.encoded import Encoded
from fedpeft.data.encoded import digest as encoded_digest
from fedpeft.data.examples import Indices
from fedpeft.data.partitions import Partition
from fedpeft.data.unusable import skipped, usable
from fedpeft.errors import Problems
from fedpeft.server import sampling
from fedpeft.strategies.strategy import Strategy
from fedpeft.tasks.task import Task
from fedpeft.training import prepare


@dataclass(frozen=True)
class Split:
    """The data of a run, dealt out."""

    corpus: Corpus
    partition: Partition


@dataclass(frozen=True)
class Parts:
    """A federation, loaded and ready for round 1."""

    split: Split
    adapted: Adapted
    strategy: Strategy
    task: Task
    worker: Worker
    ranks: dict[int, int]  # client -> rank, where clients have their own
    test: Encoded
    tested: Indices  # [test], the rows of the corpus's test part that `test` holds
    notes: tuple[str, ...]  # what was skipped or cut
    data_digest: str  # of every client's examples and the test part: a resumed run must see the same


def deal(config: Config) -> Split:
    """Read the data and split it over the clients. Raises UserError."""
    found = corpus.load(config.data, config.model.build(), config.seed)
    return Split(found, partitions.split(config.partition, found.train, seeds.generator(config.seed, "partition")))


def assemble(config: Config, check: Callable[[], None] | None = None, ledgers: pathlib.Path | None = None) -> Parts:
    """Load data, model and adapter. Raises one UserError with the problems of all three, and of `check` if given.

    With privacy, each client's ledger is kept in the folder `ledgers`, or in memory alone when there is none.
    """
    task: Task = config.model.build()
    adapter: Adapter = config.adapter.build()
    problems = Problems()
    if check is not None:
        with problems.gather():
            check()
    split: Split | None = None
    with problems.gather():
        split = deal(config)
    labels = len(split.corpus.train.label_names) if split else 2
    prepare.check(config, labels, problems)
    strategy: Strategy = config.strategy.build()
    ranks: dict[int, int] = {}
    if split is not None:
        sampling.check(config, strategy, len(split.partition.indices), problems)
        with problems.gather():
            ranks = adapter.ranks(split.partition.names, config.seed)
    problems.raise_if_any()
    assert split is not None
    ready = prepare.prepare(config, labels)
    loaded, names = ready.adapted.base, split.partition.names
    train, tested = task.encode(split.corpus.train, loaded, config.data), task.encode(split.corpus.test, loaded, config.data)
    owned = {
        client: usable(train.take(rows), f"client {names[client]}", split.corpus.train, train)
        for client, rows in enumerate(split.partition.indices)
    }
    test = usable(tested.usable(), "the server", split.corpus.test, tested)
    nodes = {client: Node.split(client, mine, config.data, config.seed, task, loaded) for client, mine in owned.items()}
    named = {client: (split.partition.names[client], len(node.train)) for client, node in nodes.items()}
    guards = prepare.guards(config, ready.adapted, named, lambda client: ledgers / f"client-{client}.jsonl" if ledgers else None)
    worker = Worker(config, ready.adapted, task, ready.strategy, nodes, ready.surveys, len(nodes), guards)
    digest = encoded_digest([*(node.train for node in nodes.values()), test])
    notes = (*skipped("training", split.corpus.train, train, config.data), *skipped("test", split.corpus.test, tested, config.data))
    kept = np.setdiff1d(np.arange(len(tested)), sorted(tested.left_out))
    return Parts(split, ready.adapted, ready.strategy, task, worker, ranks, test, kept, notes, digest)
