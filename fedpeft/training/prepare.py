"""What every process of a run loads, alike for the same config: the base with its adapter, the strategy, and the surveys agreed to."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft import base
from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapter import Adapter
from fedpeft.config import Config
from fedpeft.errors import Problems
from fedpeft.lookup import find
from fedpeft.privacy import planning
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.planning import Plan
from fedpeft.records import Arrays
from fedpeft.strategies.strategy import Strategy
from fedpeft.tasks.task import Task
from fedpeft.training import private
from fedpeft.training.apart import Apart
from fedpeft.training.job import local_steps
from fedpeft.training.prefix import Prefix
from fedpeft.training.unread import Unread

ADAPTER = "adapter"  # the action of the survey that an adapter needs


@dataclass(frozen=True)
class Prepared:
    """A model that can be trained and evaluated, and what is done with it."""

    adapted: Adapted
    strategy: Strategy
    task: Task
    surveys: Mapping[str, Any]  # action -> survey that the config agrees to
    drawn: Arrays  # adapter and head as the seed gives them, whatever is written into the model later


def check(config: Config, labels: int, problems: Problems) -> None:
    """What can be found wrong with model, adapter and device before any weights are read."""
    task, adapter = config.model.build(), config.adapter.build()
    with problems.gather():
        skeleton = base.skeleton(config.model, task, labels)
        adapter.check(skeleton, task.peft_task)
        positions = _positions(skeleton)
        if positions is not None and config.data.max_length > positions:
            got = f"{config.data.max_length} tokens are more than the model's {positions} positions"
            problems.add("data.max_length", got, do="lower it")
    with problems.gather():
        base.choose_device(config.training)


def _positions(skeleton: Any) -> int | None:
    """How many tokens a text may have, where the model says; RoBERTa and its kin count positions from behind the padding's."""
    import torch

    tables = (
        part for name, part in skeleton.named_modules() if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding)
    )
    skipped = max((part.padding_idx + 1 for part in tables if part.padding_idx is not None), default=0)
    most: int | None = getattr(skeleton.config, "max_position_embeddings", None)
    return None if most is None else most - skipped


def prepare(config: Config, labels: int) -> Prepared:
    """Load the base and put the adapter on it, both as the seed says. Raises UserError."""
    task: Task = config.model.build()
    adapter: Adapter = config.adapter.build()
    strategy: Strategy = config.strategy.build()
    loaded = base.load(config.model, task, labels, config.training, config.seed)
    adapted = adapter.attach(loaded, task.peft_task, config.seed, train_head=config.training.head == "trained")
    strategy.check(adapted.layout())
    adapted.add_sparse(strategy.sparse(adapted.layout(), config.seed))
    adapted.prefix = Prefix(adapted, task.outputs, config.training.prefix_cache, config.training.prefix_cache_gb)
    adapted.unread = Unread(adapted, task.outputs)
    adapted.apart = Apart(adapted, task.outputs)
    surveys = {ADAPTER: adapter.survey()}
    if task.class_statistics:
        surveys = {config.training.head_init: find("head_init", config.training.head_init)(), **surveys}
    return Prepared(
        adapted, strategy, task, {action: survey for action, survey in surveys.items() if survey and survey.asks}, adapted.read()
    )


def plans(config: Config, clients: Mapping[str, int]) -> list[Plan]:
    """What each client will do under privacy, by its name and number of examples, or all of them together, where the unit is a
    client. Raises UserError with the problems of all."""
    assert config.privacy is not None
    if config.privacy.of_clients:
        return [planning.client_plan(config.privacy, len(clients), config.strategy.fraction_train, config.strategy.num_rounds)]
    batch = config.training.per_device_train_batch_size * config.training.gradient_accumulation_steps
    found, problems = [], Problems()
    for name, examples in clients.items():
        with problems.gather():
            steps = local_steps(config, examples)
            found.append(planning.plan(config.privacy, name, examples, batch, steps, config.strategy.num_rounds))
    problems.raise_if_any()
    return found


def guards(
    config: Config, adapted: Adapted, clients: Mapping[int, tuple[str, int]], ledger: Callable[[int], pathlib.Path | None]
) -> dict[int, Guard]:
    """The guard of each client, client -> (its name, number of examples), with its ledger at `ledger(client)`; none where the clients
    have nothing to guard: without privacy, and where the server adds the noise."""
    if config.privacy is None or config.privacy.of_clients:
        return {}
    private.check(adapted)
    planned = plans(config, {name: examples for name, examples in clients.values()})
    C, seed = config.privacy.max_grad_norm, config.privacy.insecure_seed
    return {client: Guard(plan, Ledger(ledger(client)), C, client, seed) for client, plan in zip(clients, planned, strict=True)}
