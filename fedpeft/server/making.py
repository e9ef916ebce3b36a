"""A `Federation` of what was prepared: the same for clients in this process and for real ones."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

from fedpeft.config import Config
from fedpeft.data.encoded import Encoded
from fedpeft.errors import Problems
from fedpeft.privacy.curator import curator
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.statement import of_clients
from fedpeft.records import Arrays, Metrics
from fedpeft.server.federation import Federation, Survey
from fedpeft.training.evaluate import evaluate
from fedpeft.training.prepare import Prepared


def make(
    config: Config,
    ready: Prepared,
    test: Encoded,
    data: str,
    roster: Callable[[], dict[int, int]],
    clients: int,
    ranks: dict[int, int],
    ledger: pathlib.Path | None,
    reported: Callable[[Arrays], Arrays] = lambda arrays: arrays,
) -> Federation:
    """The server's side of a run, which evaluates what is `reported` of the global arrays on the `test` part; `data` is its digest.

    Where whole clients are private, the server's ledger is kept at `ledger` (None: in memory alone). Raises UserError for an edited one.
    """
    adapted, strategy, adapter = ready.adapted, ready.strategy, ready.adapted.adapter
    layout, drawn = adapted.layout(), ready.drawn

    section, shape = config.privacy, config.strategy
    keeper = curator(section, Ledger(ledger if section and section.of_clients else None), clients, shape.fraction_train, shape.num_rounds)

    def measure(arrays: Arrays) -> Metrics:
        return evaluate(adapted, ready.task, reported(arrays), test, config.training.per_device_eval_batch_size)

    return Federation(
        config=config,
        strategy=strategy,
        base=adapted.base.fingerprint,
        data=data,
        layout=layout,
        arrays={**drawn, **adapted.merges, **strategy.extras({name: drawn[name] for name in adapted.trained})},
        trained=adapted.trained,
        evaluate=measure,
        primary_metric=ready.task.primary_metric,
        higher_is_better=ready.task.higher_is_better,
        roster=roster,
        clients=clients,
        resting=functools.partial(adapter.resting, layout),
        settle=functools.partial(adapter.settle, layout=layout),
        ranks=ranks,
        surveys=tuple(
            Survey(action, survey.expects(layout), functools.partial(survey.finish, layout=layout))
            for action, survey in ready.surveys.items()
        ),
        reported=reported,
        privacy=lambda: of_clients(keeper) if keeper else None,
        curator=keeper,
    )


def check_global(config: Config, problems: Problems) -> None:
    """A server that does not hold its clients needs a global model, to evaluate it and to write it."""
    if config.strategy.build().personal:
        got = f"{config.strategy.name} leaves a part of every model at its client, so that the server has none to evaluate or to write"
        problems.add("strategy.name", got, do="take another strategy; fedpeft simulate runs this one")
