"""The end of a run: the run folder is filled with what people and other programs read."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedpeft.adapters.adapted import Adapted
from fedpeft.curves import curves
from fedpeft.intervals import best
from fedpeft.privacy.statement import reported
from fedpeft.records import Arrays
from fedpeft.report import write_report
from fedpeft.runs import read_run
from fedpeft.server.federation import Federation, Outcome
from fedpeft.server.run_folder import RunFolder

if TYPE_CHECKING:
    from fedpeft.records import RoundRecord

VERSIONED = ("fedpeft", "flwr", "torch", "transformers", "peft", "numpy")


def end(
    federation: Federation,
    outcome: Outcome,
    adapted: Adapted,
    labels: Sequence[str],
    folder: RunFolder,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write adapter, summary (with `more` in it), curves and report; the summary."""
    reported = federation.reported(outcome.arrays)
    adapted.write(reported)
    adapted.save(folder.adapter)
    for client, memory in personal(federation).items():
        adapted.write({**reported, **memory})
        adapted.save(folder.personal(client))
    summary = {**summarise(federation, outcome, adapted, labels), **(more or {})}
    folder.write_summary(summary)
    run = read_run(folder.path)
    curves(run, folder.path / "curves.png")
    write_report([run], folder.path)
    return summary


def personal(federation: Federation) -> dict[str, Arrays]:
    """Client -> the part of its model that stayed with it, where the strategy is personal and the clients are at hand."""
    found: dict[str, Arrays] = {}
    for key, array in (federation.memories() if federation.strategy.personal else {}).items():
        client, _, name = key.partition("/")
        found.setdefault(client, {})[name] = array
    return found


def summarise(federation: Federation, outcome: Outcome, adapted: Adapted, labels: Sequence[str]) -> dict[str, Any]:
    """The run in one object: the contract of summary.json."""
    config, records = federation.config, outcome.records
    trained = [record for record in records if record.round > 0]
    scores = {place: record.metrics[federation.primary_metric] for place, record in enumerate(trained or records)}
    top = (trained or records)[best(scores, federation.higher_is_better)]
    return {
        "name": config.name,
        "strategy": config.strategy.name,
        "adapter": config.adapter.name,
        "labels": list(labels),
        "seed": config.seed,
        "rounds_completed": len(trained),
        "stopped_because": outcome.stopped_because,
        "primary_metric": federation.primary_metric,
        "higher_is_better": federation.higher_is_better,
        "initial": records[0].metrics,
        "metrics": records[-1].metrics,
        "best": {"round": top.round, **top.metrics},
        "bytes_up": sum(record.bytes_up for record in records),
        "bytes_down": sum(record.bytes_down for record in records),
        "trainable_parameters": adapted.trainable_parameters,
        "base_parameters": adapted.base_parameters,
        "first_trained_layer": adapted.first_trained_layer,
        **adapted.adapter.report(federation.layout, outcome.arrays),
        "privacy": _privacy(federation, records),
        "seconds": _seconds(records),
        "rejected_updates": sum(sum(record.rejected.values()) for record in records),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in VERSIONED}},
    }


def _privacy(federation: Federation, records: list[RoundRecord]) -> dict[str, Any] | None:
    section = federation.config.privacy
    if section is None or (said := federation.privacy()):
        return None if section is None else said
    return reported(section, [record.epsilon for record in records if record.epsilon is not None])


def _seconds(records: list[RoundRecord]) -> dict[str, float]:
    """By phase, over all rounds, and their total."""
    phases = sorted({phase for record in records for phase in record.seconds})
    spent = {phase: sum(record.seconds.get(phase, 0.0) for record in records) for phase in phases}
    return {**spent, "total": sum(spent.values())}
