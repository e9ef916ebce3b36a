"""The tables of a study, for programs and for people.

DIR/results.csv   a row a cell: settings, seed, status and what came out
DIR/curves.csv    a row a round of a finished cell: the primary metric, and the bytes sent up and down until then
DIR/tuning.csv    a row a candidate, when settings were tuned
DIR/study.md      a row an arm: mean, interval, paired difference to the first arm, what it cost; what privacy costs; what failed
"""

from __future__ import annotations

import csv
import io
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedpeft.intervals import CONFIDENCE, Estimate, estimate
from fedpeft.report import RESULTS
from fedpeft.runs import Run
from fedpeft.simulations import study_epsilon
from fedpeft.simulations.study_results import Cell, Results, Trial, finished, keys, paired, reaches, track
from fedpeft.units import format_bytes, format_number, format_seconds, one_line

INTERVAL = f"{100 * CONFIDENCE:.0f} % interval"


def write_tables(results: Results, out: pathlib.Path) -> None:
    """Write every table of the study into `out`."""
    texts = {"study.md": _page(results), "results.csv": _cells_csv(results), "curves.csv": _curves_csv(results)}
    if results.trials:
        texts["tuning.csv"] = _tuning_csv(results.trials)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", newline="")


def arm_table(results: Results) -> str:
    """A row an arm, as Markdown that is aligned for a terminal too."""
    arms = results.arms
    first = next(iter(arms))
    tuned = keys(trial.cell for trial in results.trials)
    head = ["arm", *tuned, "seeds", results.metric, INTERVAL]
    if len(arms) > 1:
        head += [f"against {first}", INTERVAL]
    if results.target is not None:
        head += [f"rounds to {results.target:g}", f"bytes to {results.target:g}"]
    rows = []
    for name, cells in arms.items():
        runs = finished(cells)
        final, sent, seconds = (_mean(cells, *names) for names in (("final",), ("bytes_up", "bytes_down"), ("seconds",)))
        row = [name, *(cells[0].settings.get(key, "-") for key in tuned), f"{len(runs)} of {len(cells)}"]
        row += [format_number(final.mean), _interval(final, format_number)]
        if len(arms) > 1:
            difference = paired(cells, arms[first]) if name != first else estimate([])
            row += [_signed(difference.mean), _interval(difference, _signed)]
        if results.target is not None:
            row += _to_target(runs, results.target)
        rows.append([*row, _bytes(sent.mean), format_seconds(seconds.mean), str(sum(cell.status == "failed" for cell in cells) or "-")])
    return _markdown([*head, "bytes", "time", "failed"], rows)


def _mean(cells: Iterable[Cell], *names: str) -> Estimate:
    """Over the finished cells, of the sum of what stands under the names."""
    return estimate(sum(cell.result(name) for name in names) for cell in cells if cell.run)


def _interval(found: Estimate, say: Callable[[float], str]) -> str:
    if found.mean is None or found.half_width is None:
        return "-"
    return f"{say(found.mean - found.half_width)} to {say(found.mean + found.half_width)}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _bytes(count: float | None) -> str:
    return "-" if count is None else format_bytes(count)


def _to_target(runs: Sequence[Run], target: float) -> list[str]:
    """Mean rounds and bytes of the runs that reach the target, and how many they are."""
    points = [point for run in runs if (point := reaches(run, target))]
    rounds, sent = estimate(point.round for point in points).mean, estimate(point.bytes for point in points).mean
    there = f"({len(points)} of {len(runs)})"
    return [f"{'-' if rounds is None else f'{rounds:.3g}'} {there}", f"{_bytes(sent)} {there}"]


def _page(results: Results) -> str:
    arms = results.arms
    seeds = sorted({cell.seed for cell in results.cells})
    parts = [
        f"# {_text(results.name)}: {len(arms)} arms, {len(seeds)} seeds",
        f"{results.metric} on the {results.split} split after the last round: the mean over the seeds ({seeds[0]} to {seeds[-1]}) that "
        f"finished, with the {INTERVAL} of Student's t. Differences to {_text(next(iter(arms)))} are taken seed by seed, over the seeds "
        "that both finished. Bytes (sent up and down) and time are means over the runs.",
        arm_table(results),
    ]
    if results.target is not None:
        said = "means over the seeds that get there, and how many do"
        parts.append(f"Rounds and bytes until {results.metric} is first {results.target:g} or better: {said}.")
    parts.append("![the metric against rounds and bytes](study.png)")
    if costs := study_epsilon.costs(results):
        said = f"{results.metric} against epsilon: arms that differ in nothing but privacy are a row; mean and {INTERVAL} over the seeds."
        parts += ["## What privacy costs", said, _markdown(*study_epsilon.table(costs)), "![the metric against epsilon](epsilon.png)"]
    if results.trials:
        parts += [
            "## Picked on the validation split",
            f"At seed {seeds[0]} every candidate was trained without a part of the training examples, and judged on that part after its "
            "last round; the test part of that seed was left alone. Data without a test split of its own has another test part at every "
            "seed: some of its examples may have trained the candidates.",
            _trial_table(results.trials),
        ]
    if results.failed:
        rows = [[cell.arm, str(cell.seed), cell.reason] for cell in results.failed]
        parts += ["## Failed", _markdown(["arm", "seed", "reason"], rows), "The same command tries them again."]
    return "\n\n".join(parts) + "\n"


def _trial_table(trials: Sequence[Trial]) -> str:
    tuned = keys(trial.cell for trial in trials)
    rows = []
    for cell, picked in trials:
        score = format_number(cell.result("final")) if cell.run else cell.reason
        rows.append([cell.arm, *(cell.settings[key] for key in tuned), score, "yes" if picked else ""])
    return _markdown(["arm", *tuned, "score", "picked"], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as their widest cell."""
    cells = [[_text(cell) for cell in line] for line in (head, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(f"| {line} |" for line in (lines[0], " | ".join("-" * width for width in widths), *lines[1:]))


def _text(text: str) -> str:
    """Text as Markdown that shows it as it is; an underscore within a word needs no escape."""
    return re.sub(r"([\\`*\[\]|<])", r"\\\1", one_line(text))


def _cells_csv(results: Results) -> str:
    named = keys(results.cells)
    to_target = [] if results.target is None else ["rounds_to_target", "bytes_to_target"]
    rows = []
    for cell in results.cells:
        found = [cell.result(column.key) for column in RESULTS]
        if results.target is not None:
            point = reaches(cell.run, results.target) if cell.run else None
            found += [point.round, point.bytes] if point else [None, None]
        rows.append([cell.arm, *(cell.settings.get(key) for key in named), cell.seed, cell.status, *found, one_line(cell.reason)])
    return _csv(["arm", *named, "seed", "status", *(column.key for column in RESULTS), *to_target, "reason"], rows)


def _curves_csv(results: Results) -> str:
    runs = [(cell, cell.run) for cell in results.cells if cell.run]
    rows = [[cell.arm, cell.seed, point.round, run.primary_metric, point.value, point.bytes] for cell, run in runs for point in track(run)]
    return _csv(["arm", "seed", "round", "metric", "value", "bytes"], rows)


def _tuning_csv(trials: Sequence[Trial]) -> str:
    tuned = keys(trial.cell for trial in trials)
    rows = []
    for cell, picked in trials:
        found = [cell.result("metric"), cell.result("final"), "yes" if picked else "no", one_line(cell.reason)]
        rows.append([cell.arm, *(cell.settings[key] for key in tuned), cell.seed, cell.status, *found])
    return _csv(["arm", *tuned, "seed", "status", "metric", "score", "picked", "reason"], rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()
