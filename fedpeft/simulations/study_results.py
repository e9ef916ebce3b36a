"""What a study came to: its cells and trials, and what is read off their runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedpeft.curves import metric_by_bytes, metric_by_round
from fedpeft.intervals import Estimate, estimate
from fedpeft.report import RESULTS
from fedpeft.runs import Run


@dataclass(frozen=True)
class Cell:
    """One run of a study: an arm and a seed."""

    arm: str
    settings: Mapping[str, str]  # the arm's, and those that were picked for it
    seed: int
    run: Run | None = None  # once it is finished
    reason: str = ""  # why it failed

    @property
    def status(self) -> str:
        """finished, failed, or not run (yet)."""
        return "finished" if self.run else "failed" if self.reason else "not run"

    def result(self, key: str) -> Any:
        """What came out under `key` of `report.RESULTS`; None when the cell has not finished."""
        return next(column.value(self.run.summary) for column in RESULTS if column.key == key) if self.run else None


class Trial(NamedTuple):
    """One candidate of an arm, run on the validation split."""

    cell: Cell  # its settings are the tuned ones alone
    picked: bool


@dataclass(frozen=True)
class Results:
    """Everything that tables and picture are made of."""

    name: str
    cells: Sequence[Cell]  # arm by arm; the first arm is the one that the others are compared with
    trials: Sequence[Trial] = ()
    target: float | None = None

    @property
    def arms(self) -> dict[str, list[Cell]]:
        """The cells of each arm, in the order of the study."""
        return {name: [cell for cell in self.cells if cell.arm == name] for name in dict.fromkeys(cell.arm for cell in self.cells)}

    @property
    def failed(self) -> list[Cell]:
        """The cells that failed."""
        return [cell for cell in self.cells if cell.status == "failed"]

    @property
    def metric(self) -> str:
        """The name of what the arms are judged by."""
        return " / ".join(dict.fromkeys(run.primary_metric for run in finished(self.cells))) or "metric"

    @property
    def split(self) -> str:
        """Which examples the server evaluated on."""
        return " / ".join(dict.fromkeys(run.config["data"]["evaluate_on"] for run in finished(self.cells))) or "test"


class Point(NamedTuple):
    """The primary metric after a round, and what was sent up and down until then."""

    round: float
    value: float
    bytes: float


def finished(cells: Iterable[Cell]) -> list[Run]:
    """The runs of the cells that have finished."""
    return [cell.run for cell in cells if cell.run]


def keys(cells: Iterable[Cell]) -> list[str]:
    """Every key that the settings of a cell hold, once."""
    return list(dict.fromkeys(key for cell in cells for key in cell.settings))


def track(run: Run) -> list[Point]:
    """The run's way, round 0 (before training) first; rounds in which the metric is no number are left out."""
    along = zip(metric_by_round(run), metric_by_bytes(run), strict=True)
    return [Point(round, value, spent) for (round, value), (spent, _) in along]


def reaches(run: Run, target: float) -> Point | None:
    """Where the primary metric is first at `target` or better."""
    sign = 1 if run.higher_is_better else -1
    return next((point for point in track(run) if sign * point.value >= sign * target), None)


def paired(cells: Iterable[Cell], reference: Iterable[Cell]) -> Estimate:
    """The difference in the final metric to the cells of another arm, over the seeds that both have finished."""
    theirs = {cell.seed: cell.result("final") for cell in reference if cell.run}
    return estimate(cell.result("final") - theirs[cell.seed] for cell in cells if cell.run and cell.seed in theirs)
