"""Who takes part in a round: a uniform sample without replacement, drawn from (seed, round) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeft import seeds
from fedpeft.config import Config
from fedpeft.errors import Problems
from fedpeft.privacy.curator import curator
from fedpeft.privacy.ledger import Ledger
from fedpeft.strategies.strategy import Strategy


def size(available: int, fraction: float, minimum: int) -> int:
    """How many of the available clients are asked: ceil(fraction * available), at least `minimum`, at most all."""
    return min(available, max(minimum, math.ceil(fraction * available - 1e-9)))


def choose(available: Sequence[int], fraction: float, minimum: int, seed: int, round: int) -> list[int]:
    """The clients asked in `round`, sorted."""
    wanted = size(len(available), fraction, minimum)
    drawn = seeds.generator(seed, "sampling", round).choice(sorted(available), wanted, replace=False)
    return sorted(int(client) for client in drawn)


def check(config: Config, strategy: Strategy, clients: int, problems: Problems) -> None:
    """Numbers of clients that a round could never reach."""
    if config.privacy is not None and config.privacy.of_clients:
        with problems.gather():
            curator(config.privacy, Ledger(None), clients, config.strategy.fraction_train, config.strategy.num_rounds)
    asked = size(clients, config.strategy.fraction_train, config.strategy.min_train_nodes)
    if asked < strategy.fewest:
        got = f"{config.strategy.name} needs {strategy.fewest} updates a round, and {asked} of {clients} clients are asked"
        problems.add("strategy.fraction_train", got, do="raise it, or partition.clients")
    for key in ("min_available_nodes", "min_train_nodes"):
        if (wanted := getattr(config.strategy, key)) > clients:
            problems.add(f"strategy.{key}", f"{wanted} is more than the {clients} clients there are", f"at most {clients}")
