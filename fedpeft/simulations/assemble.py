"""From a config to the parts of a federation, every problem of the input found before anything is trained."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft import base, seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapter import Adapter
from fedpeft.client.node import Node
from fedpeft.client.worker import Worker
from fedpeft.config import Config
from fedpeft.data import corpus, partitions
from fedpeft.data.corpus import Corpus
from fedpeft.data.encoded import Encoded
from fedpeft.data.partitions import Partition
from fedpeft.errors import Problems
from fedpeft.lookup import find
from fedpeft.privacy import planning
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.planning import Plan
from fedpeft.server import sampling
from fedpeft.strategies.strategy import Strategy
from fedpeft.training import private
from fedpeft.training.job import local_steps

ADAPTER = "adapter"  # the action of the survey that an adapter needs


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
    task: Any
    worker: Worker
    ranks: dict[int, int]  # client -> rank, where clients have their own
    test: Encoded
    train_truncated: int  # training texts that lost their end
    data_digest: str  # of every client's examples and the test part: a resumed run must see the same


def deal(config: Config) -> Split:
    """Read the data and split it over the clients. Raises UserError."""
    task = find("task", config.model.task)()
    found = corpus.load(config.data, task.roles(config.data.columns), config.seed)
    return Split(found, partitions.split(config.partition, found.train, seeds.generator(config.seed, "partition")))


def assemble(config: Config, check: Callable[[], None] | None = None, ledgers: pathlib.Path | None = None) -> Parts:
    """Load data, model and adapter. Raises one UserError with the problems of all three, and of `check` if given.

    With privacy, each client's ledger is kept in the folder `ledgers`, or in memory alone when there is none.
    """
    task = find("task", config.model.task)()
    adapter: Adapter = config.adapter.build()
    problems = Problems()
    if check is not None:
        with problems.gather():
            check()
    split: Split | None = None
    with problems.gather():
        split = deal(config)
    labels = len(split.corpus.train.label_names) if split else 2
    with problems.gather():
        skeleton = base.skeleton(config.model, task, labels)
        adapter.check(skeleton, task.peft_task)
        positions = getattr(skeleton.config, "max_position_embeddings", None)
        if positions is not None and config.data.max_length > positions:
            problems.add(
                "data.max_length", f"{config.data.max_length} tokens are more than the model's {positions} positions", do="lower it"
            )
    with problems.gather():
        base.choose_device(config.training)
    strategy: Strategy = config.strategy.build()
    ranks: dict[int, int] = {}
    if split is not None:
        _check_counts(config, strategy, len(split.partition.indices), problems)
        with problems.gather():
            ranks = adapter.ranks(split.partition.names, config.seed)
    problems.raise_if_any()
    assert split is not None
    loaded = base.load(config.model, task, labels, config.training, config.seed)
    adapted = adapter.attach(loaded, task.peft_task, config.seed, train_head=config.training.head == "trained")
    strategy.check(adapted.layout())
    adapted.add_sparse(strategy.sparse(adapted.layout(), config.seed))
    train = task.encode(split.corpus.train, loaded.tokenizer, config.data.max_length)
    nodes = {
        client: Node.split(client, train.take(rows), config.data.validation_fraction, config.seed)
        for client, rows in enumerate(split.partition.indices)
    }
    test = task.encode(split.corpus.test, loaded.tokenizer, config.data.max_length)
    surveys = {config.training.head_init: find("head_init", config.training.head_init)(), ADAPTER: adapter.survey()}
    agreed = {action: survey for action, survey in surveys.items() if survey and survey.asks}
    guards: dict[int, Guard] = {}
    if config.privacy is not None:
        private.check(adapted)
        plans = plan_privacy(config, {split.partition.names[client]: len(node.train) for client, node in nodes.items()})
        paths = [ledgers / f"client-{client}.jsonl" if ledgers else None for client in nodes]
        for client, (plan, path) in enumerate(zip(plans, paths, strict=True)):
            guards[client] = Guard(plan, Ledger(path), config.privacy.max_grad_norm, client, config.privacy.insecure_seed)
    worker = Worker(config, adapted, task, strategy, nodes, agreed, len(nodes), guards)
    return Parts(
        split, adapted, strategy, task, worker, ranks, test, train.truncated, _digest([*(node.train for node in nodes.values()), test])
    )


def plan_privacy(config: Config, clients: Mapping[str, int]) -> list[Plan]:
    """The plan of every client, by its name and number of examples. Raises UserError with the problems of all."""
    assert config.privacy is not None
    batch = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    plans, problems = [], Problems()
    for name, examples in clients.items():
        with problems.gather():
            steps = local_steps(config, examples)
            plans.append(planning.plan(config.privacy, name, examples, batch, steps, config.strategy.num_rounds))
    problems.raise_if_any()
    return plans


def _check_counts(config: Config, strategy: Strategy, clients: int, problems: Problems) -> None:
    """Numbers of clients that a round could never reach."""
    asked = sampling.size(clients, config.strategy.fraction_train, config.strategy.min_train_nodes)
    if asked < strategy.fewest:
        got = f"{config.strategy.name} needs {strategy.fewest} updates a round, and {asked} of {clients} clients are asked"
        problems.add("strategy.fraction_train", got, do="raise it, or partition.clients")
    for key in ("min_available_nodes", "min_train_nodes"):
        if (wanted := getattr(config.strategy, key)) > clients:
            problems.add(f"strategy.{key}", f"{wanted} is more than the {clients} clients there are", f"at most {clients}")


def _digest(parts: Sequence[Encoded]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.labels.tobytes() + b"|")
        for row in part.inputs:
            sha.update(row["input_ids"].tobytes() + b"|")
    return sha.hexdigest()[:16]
