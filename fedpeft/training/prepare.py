"""What every process of a run loads, alike for the same config: the base with its adapter, the strategy, and the surveys agreed to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft import base
from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapter import Adapter
from fedpeft.config import Config
from fedpeft.errors import Problems
from fedpeft.lookup import find
from fedpeft.strategies.strategy import Strategy

ADAPTER = "adapter"  # the action of the survey that an adapter needs


@dataclass(frozen=True)
class Prepared:
    """A model that can be trained and evaluated, and what is done with it."""

    adapted: Adapted
    strategy: Strategy
    task: Any
    surveys: Mapping[str, Any]  # action -> survey that the config agrees to


def check(config: Config, labels: int, problems: Problems) -> None:
    """What can be found wrong with model, adapter and device before any weights are read."""
    task, adapter = find("task", config.model.task)(), config.adapter.build()
    with problems.gather():
        skeleton = base.skeleton(config.model, task, labels)
        adapter.check(skeleton, task.peft_task)
        positions = getattr(skeleton.config, "max_position_embeddings", None)
        if positions is not None and config.data.max_length > positions:
            got = f"{config.data.max_length} tokens are more than the model's {positions} positions"
            problems.add("data.max_length", got, do="lower it")
    with problems.gather():
        base.choose_device(config.training)


def prepare(config: Config, labels: int) -> Prepared:
    """Load the base and put the adapter on it, both as the seed says. Raises UserError."""
    task = find("task", config.model.task)()
    adapter: Adapter = config.adapter.build()
    strategy: Strategy = config.strategy.build()
    loaded = base.load(config.model, task, labels, config.training, config.seed)
    adapted = adapter.attach(loaded, task.peft_task, config.seed, train_head=config.training.head == "trained")
    strategy.check(adapted.layout())
    adapted.add_sparse(strategy.sparse(adapted.layout(), config.seed))
    surveys = {config.training.head_init: find("head_init", config.training.head_init)(), ADAPTER: adapter.survey()}
    return Prepared(adapted, strategy, task, {action: survey for action, survey in surveys.items() if survey and survey.asks})
