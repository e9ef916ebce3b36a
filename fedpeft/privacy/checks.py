"""What differential privacy cannot protect is refused when the config is read, with the reason."""

from __future__ import annotations

import math
from typing import Any

from fedpeft.errors import Problem, UserError


def check(config: Any, strategy: Any, adapter: Any) -> None:
    """Raises UserError when something of the data would leave without noise. Loads nothing."""
    if config.privacy is None:
        return
    problems = _of_clients(config, strategy) if config.privacy.of_clients else _of_examples(config, strategy)
    problems += _unclipped(config.privacy)
    if config.training.asks_before and config.model.build().class_statistics:
        got = f"{config.training.head_init} sums the clients' features without noise"
        problems.append(Problem("training.head_init", got, "random, with privacy"))
    if not config.model.build().records_stay_apart:
        got = "packed records share a row, and the gradient of one of them cannot be clipped alone"
        problems.append(Problem("model.packing", got, "false, with privacy"))
    if adapter.survey() is not None:
        got = f"{config.adapter.name} starts from sums over the clients' data, without noise"
        problems.append(Problem("adapter.name", got, do="take a start that is drawn from the seed"))
    if config.data.validation_fraction:
        got = "metrics of the clients' own examples would travel without noise"
        problems.append(Problem("data.validation_fraction", got, "0, with privacy"))
    if problems:
        raise UserError(*problems)


def _unclipped(section: Any) -> list[Problem]:
    key = "clipping_norm" if section.of_clients else "max_grad_norm"
    if math.isinf(getattr(section, key)) and section.noise_multiplier != 0:
        got = "infinite: no noise hides what is not clipped"
        return [Problem(f"privacy.{key}", got, "a number", "infinity is for noise_multiplier: 0, to compare with a plain run")]
    return []


def _of_examples(config: Any, strategy: Any) -> list[Problem]:
    if strategy.noise_proof:
        return []
    got = f"{config.strategy.name} uploads functions of the data that training's noise does not cover"
    return [Problem("strategy.name", got, do="take fedavg, ffa_lora, lora_fair, fed_svd or ro_lora, or leave privacy out")]


def _of_clients(config: Any, strategy: Any) -> list[Problem]:
    problems = []
    if not strategy.of_mean:
        got = f"{config.strategy.name} needs more of single clients than a noisy mean, which is all that unit client releases"
        do = "take fedavg, ffa_lora, fed_sb, ro_lora, fed_svd or lora_fair, or a server optimiser over one, or unit example"
        problems.append(Problem("strategy.name", got, do=do))
    if config.strategy.min_train_nodes > 1:
        got = f"{config.strategy.min_train_nodes}, but whether a round counts may not depend on how many took part"
        problems.append(Problem("strategy.min_train_nodes", got, "1, with unit client"))
    return problems
