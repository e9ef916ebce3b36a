"""`simulate`: a whole federation in this process, from a config to a run folder."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedpeft.arrays import weighted_mean
from fedpeft.config import Config
from fedpeft.data import partitions
from fedpeft.data.partitions.picture import draw
from fedpeft.errors import Problem, Problems, UserError
from fedpeft.lookup import find
from fedpeft.privacy.statement import statement
from fedpeft.quiet import quiet_libraries
from fedpeft.records import Arrays
from fedpeft.screen import Screen, choose
from fedpeft.server import rounds, samples
from fedpeft.server.ending import end
from fedpeft.server.federation import Federation, Outcome
from fedpeft.server.making import make
from fedpeft.server.run_folder import RunFolder
from fedpeft.simulations import per_client
from fedpeft.simulations.assemble import Parts, assemble
from fedpeft.training.prepare import Prepared


@dataclass(frozen=True)
class RunResult:
    """What `simulate` gives back; the same is on disk in `folder`."""

    summary: dict[str, Any]
    folder: pathlib.Path
    arrays: Arrays

    @property
    def adapter_dir(self) -> pathlib.Path:
        """The federated adapter as a plain PEFT folder."""
        return RunFolder(self.folder).adapter


def simulate(config: Config, out: str | pathlib.Path | None = None, resume: bool = False, screen: Screen | None = None) -> RunResult:
    """Run the federation of `config` in this process and write its run folder (`runs/NAME`, or NAME-2 and so on, when `out` is None).

    With `resume`, the run in `out` is continued after its last whole round; the final adapter is bit-identical to that of
    an uninterrupted run. Raises UserError for problems of the input, RunStopped when the run cannot go on.
    """
    if screen is None:
        with choose(json=False) as own:
            return simulate(config, out, resume, own)
    if resume and out is None:
        raise UserError(Problem("--resume", "no run to resume", do="give its folder with --out"))
    folder = RunFolder(pathlib.Path(out) if out is not None else free_folder(config.name))
    if resume:
        folder.reopen(config)
    grids = find("simulation", config.simulation.engine)

    def check() -> None:
        problems = Problems()
        for checked in (grids.check, *(() if resume else (folder.check_free,))):
            with problems.gather():
                checked()
        problems.raise_if_any()

    with quiet_libraries():
        parts = assemble(config, check, folder.ledgers)
        with grids(parts.worker) as grid:
            if not resume:
                folder.create(config)
            announce(config, parts, folder, screen)
            federation = _federation(config, parts, lambda: grid.roster, folder.ledger)
            keep_samples("before", config, parts, federation, federation.arrays, folder)
            outcome = rounds.run(federation, grid, folder, screen)
        summary = finish(config, parts, federation, outcome, folder)
    screen.finished(summary, folder.path)
    return RunResult(summary, folder.path, outcome.arrays)


def free_folder(name: str) -> pathlib.Path:
    """runs/NAME, or the first of NAME-2, NAME-3 ... that is not there."""
    folder, number = pathlib.Path("runs") / name, 2
    while folder.exists():
        folder, number = pathlib.Path("runs") / f"{name}-{number}", number + 1
    return folder


def announce(config: Config, parts: Parts, folder: RunFolder, screen: Screen) -> None:
    """Say what the run is about, and what was noticed while it was put together."""
    facts = {
        "clients": len(parts.worker.nodes),
        "train_examples": len(parts.split.corpus.train),
        "test_examples": len(parts.test),
        "trainable_parameters": parts.adapted.trainable_parameters,
        "base_parameters": parts.adapted.base_parameters,
        "primary_metric": parts.task.primary_metric,
        "out": str(folder.path),
    }
    screen.started(config, facts)
    for note in parts.notes:
        screen.note(note)


def keep_samples(moment: str, config: Config, parts: Parts, federation: Federation, arrays: Arrays, folder: RunFolder) -> None:
    """Let a model that says something say it, "before" or "after" training."""
    examples = parts.split.corpus.test.take(parts.tested)
    samples.keep(folder, parts.task, parts.adapted, moment, federation.reported(arrays), examples=examples, data=config.data)


def finish(config: Config, parts: Parts, federation: Federation, outcome: Outcome, folder: RunFolder) -> dict[str, Any]:
    """Draw the split, measure the model client by client, and write the run folder; the summary."""
    keep_samples("after", config, parts, federation, outcome.arrays, folder)
    train, partition = parts.split.corpus.train, parts.split.partition
    if train.labels is not None:
        draw(partitions.label_counts(partition, train), train.label_names, partition.names, folder.path / "partition.png")
    clients = per_client.measure(config, parts, federation.reported(outcome.arrays), folder)
    extra = {"clients": clients, **samples.scores(folder)}
    return end(federation, outcome, parts.adapted, parts.split.corpus.train.label_names, folder, extra)


def _federation(config: Config, parts: Parts, roster: Callable[[], dict[int, int]], ledger: pathlib.Path | None = None) -> Federation:
    def reported(arrays: Arrays) -> Arrays:
        mine = [(len(parts.worker.nodes[client].train), memory) for client, memory in parts.worker.memory.items()]
        return {**arrays, **weighted_mean(mine, like=mine[0][1])} if parts.strategy.personal and mine else arrays

    ready = Prepared(parts.adapted, parts.strategy, parts.task, parts.worker.surveys, parts.worker.drawn)
    made = make(config, ready, parts.test, parts.data_digest, roster, len(parts.worker.nodes), parts.ranks, ledger, reported)
    guards = parts.worker.guards
    return replace(
        made,
        privacy=lambda: statement(config.privacy, guards) if config.privacy is not None and guards else made.privacy(),
        memories=parts.worker.memories,
        restore=parts.worker.restore,
    )
