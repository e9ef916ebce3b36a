"""The picture of a study: the primary metric of every arm against rounds and against bytes, over its finished seeds."""

from __future__ import annotations

import itertools
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedpeft.curves import COLOURS, FEW_POINTS, STYLES
from fedpeft.runs import Run
from fedpeft.simulations.study_results import Point, Results, finished, track
from fedpeft.units import format_bytes, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAND = 0.4  # opacity of all bands together: eight of them must still let the lines be seen
LEGEND_WIDTH = 130  # characters in a line of the legend


class Line(NamedTuple):
    """An arm: its rounds, and over its seeds the mean bytes, the mean metric, and the lowest and highest."""

    rounds: list[float]
    bytes: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def draw(results: Results, path: pathlib.Path) -> None:
    """Draw the study as a PNG with two panels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    lines = {name: line(finished(cells)) for name, cells in results.arms.items()}
    named = [f"{name} ({format_number(found.mean[-1]) if found.mean else 'nothing finished'})" for name, found in lines.items()]
    columns = max(1, min(len(named), LEGEND_WIDTH // (max(map(len, named)) + 8)))
    rows = -(-len(named) // columns)
    figure = Figure(figsize=(12, 4.4 + 0.24 * rows), dpi=110, layout="constrained", facecolor="white")
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    _panel(by_round, [(found, found.rounds) for found in lines.values()])
    _panel(by_bytes, [(found, found.bytes) for found in lines.values()])
    by_round.set_title(f"{results.metric} on the {results.split} split", fontsize=11, loc="left", parse_math=False)
    by_bytes.set_title(f"{results.metric} for what was sent", fontsize=11, loc="left", parse_math=False)
    by_round.set_xlabel("round")
    by_bytes.set_xlabel("sent up and down so far")
    by_round.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    by_bytes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    by_bytes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: format_bytes(count)))
    legend = figure.legend(
        by_round.get_lines(),
        named,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        title="mean over the seeds (and at the end); the band goes from the lowest seed to the highest",
        title_fontsize=9,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in a setting is no formula
    figure.savefig(path, format="png")


def line(runs: Iterable[Run]) -> Line:
    """What is drawn for an arm: round by round, over the runs that measured the round."""
    points: dict[float, list[Point]] = defaultdict(list)
    for run in runs:
        for point in track(run):
            points[point.round].append(point)
    rounds = sorted(points)
    sent = [statistics.fmean(point.bytes for point in points[round]) for round in rounds]
    values = [[point.value for point in points[round]] for round in rounds]
    return Line(rounds, sent, [statistics.fmean(found) for found in values], list(map(min, values)), list(map(max, values)))


def _panel(axes: Axes, lines: Sequence[tuple[Line, list[float]]]) -> None:
    """Each line over its own x, with its band beneath."""
    looks = itertools.cycle(itertools.product(STYLES, COLOURS))
    for (found, x), (style, colour) in zip(lines, looks, strict=False):
        opacity = min(0.16, BAND / len(lines))
        axes.fill_between(x, found.low, found.high, facecolor=(colour, opacity), edgecolor=(colour, 0.35), linewidth=0.6)
        marker = "o" if len(x) <= FEW_POINTS else ""
        axes.plot(x, found.mean, linestyle=style, color=colour, marker=marker, markersize=3.5, linewidth=1.6)
    if not any(x for _, x in lines):
        axes.text(0.5, 0.5, "nothing has finished", ha="center", va="center", transform=axes.transAxes, color="gray")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
