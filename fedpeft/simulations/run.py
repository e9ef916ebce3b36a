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
from fedpeft.server import rounds
from fedpeft.server.ending import end
from fedpeft.server.federation import Federation
from fedpeft.server.making import make
from fedpeft.server.run_folder import RunFolder
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
            screen.started(config, facts(parts, folder))
            if cut := parts.train_truncated:
                screen.note(
                    f"{cut} of {len(parts.split.corpus.train)} training texts lost their end to data.max_length={config.data.max_length}"
                )
            federation = _federation(config, parts, lambda: grid.roster)
            outcome = rounds.run(federation, grid, folder, screen)
        draw_split(parts, folder)
        summary = end(federation, outcome, parts.adapted, parts.split.corpus.train.label_names, folder)
    screen.finished(summary, folder.path)
    return RunResult(summary, folder.path, outcome.arrays)


def free_folder(name: str) -> pathlib.Path:
    """runs/NAME, or the first of NAME-2, NAME-3 ... that is not there."""
    folder, number = pathlib.Path("runs") / name, 2
    while folder.exists():
        folder, number = pathlib.Path("runs") / f"{name}-{number}", number + 1
    return folder


def facts(parts: Parts, folder: RunFolder) -> dict[str, Any]:
    """What is said of a run when it starts."""
    return {
        "clients": len(parts.worker.nodes),
        "train_examples": len(parts.split.corpus.train),
        "test_examples": len(parts.test),
        "trainable_parameters": parts.adapted.trainable_parameters,
        "base_parameters": parts.adapted.base_parameters,
        "primary_metric": parts.task.primary_metric,
        "out": str(folder.path),
    }


def draw_split(parts: Parts, folder: RunFolder) -> None:
    """The picture of who holds how much of which label."""
    train, partition = parts.split.corpus.train, parts.split.partition
    if train.labels is not None:
        draw(partitions.label_counts(partition, train), train.label_names, partition.names, folder.path / "partition.png")


def _federation(config: Config, parts: Parts, roster: Callable[[], dict[int, int]]) -> Federation:
    def reported(arrays: Arrays) -> Arrays:
        mine = [(len(parts.worker.nodes[client].train), memory) for client, memory in parts.worker.memory.items()]
        return {**arrays, **weighted_mean(mine, like=mine[0][1])} if parts.strategy.personal and mine else arrays

    ready = Prepared(parts.adapted, parts.strategy, parts.task, parts.worker.surveys)
    return replace(
        make(config, ready, parts.test, parts.data_digest, roster, len(parts.worker.nodes), parts.ranks, reported),
        privacy=lambda: None if config.privacy is None else statement(config.privacy, parts.worker.guards),
        memories=parts.worker.memories,
        restore=parts.worker.restore,
    )
