"""`fedpeft privacy plan`: what differential privacy will cost, before anything is trained."""

from __future__ import annotations

from fedpeft.config import Config
from fedpeft.simulations.assemble import deal
from fedpeft.training.prepare import plans


def table(config: Config) -> tuple[list[str], list[list[str]], str]:
    """Column names, a row a client (or one for all of them, where whole clients are private), and what it means."""
    assert config.privacy is not None
    dealt = deal(config).partition
    planned = plans(config, {name: len(rows) for name, rows in zip(dealt.names, dealt.indices, strict=True)})
    unit, part = ("clients", "rounds") if config.privacy.of_clients else ("examples", "steps")
    rows = [
        [
            plan.name,
            f"{plan.examples:,}",
            f"{plan.q:.4f}",
            f"{plan.sigma:.4f}",
            f"{plan.steps * plan.rounds:,}",
            f"{plan.epsilon:.3f}",
            f"{plan.delta:.2g}",
        ]
        for plan in planned
    ]
    said = f"epsilon after {config.strategy.num_rounds} rounds, for a client that takes part in every one; example level"
    if config.privacy.of_clients:
        noise = planned[0].sigma / (config.strategy.fraction_train * planned[0].examples)
        said = f"every number of the mean has noise of {noise:.3g} times the clipping norm, which bounds the mean as a whole"
    return ["client", unit, "q", "sigma", part, "epsilon", "delta"], rows, said
