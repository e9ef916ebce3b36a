"""The pictures of a run, drawn after the last round: the primary metric against rounds and against bytes, and the training loss."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from fedpeft.runs import Run, labels
from fedpeft.units import format_bytes, format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, made for colour-blind readers, without its yellow: that vanishes on white."""

STYLES = ("-", "--", ":", "-.")  # the next one once the colours are used up

FEW_POINTS = 40  # up to here every round gets a mark of its own
LEGEND_COLUMNS = 3

Points = list[tuple[float, float]]


def curves(runs: Run | Sequence[Run], path: pathlib.Path | IO[bytes]) -> None:
    """Draw one run, or several over each other, as a PNG with three panels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    runs = [runs] if isinstance(runs, Run) else list(runs)
    metric = " / ".join(dict.fromkeys(run.primary_metric for run in runs))
    legend_rows = math.ceil(len(runs) / LEGEND_COLUMNS)
    figure = Figure(figsize=(13, 4 + 0.22 * legend_rows), dpi=110, layout="constrained", facecolor="white")
    by_round, by_bytes, loss = figure.subplots(1, 3)
    _panel(by_round, [metric_by_round(run) for run in runs], f"{metric} on the test split", "round")
    _panel(by_bytes, [metric_by_bytes(run) for run in runs], f"{metric} for what was sent", "sent up and down so far")
    _panel(loss, [loss_by_round(run) for run in runs], "training loss of the clients", "round")
    loss.set_xlim(by_round.get_xlim())
    for axes in (by_round, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    by_bytes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    by_bytes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: format_bytes(count)))
    finals = [format_number(run.summary["metrics"].get(run.primary_metric)) for run in runs]
    named = [f"{label} ({final} at the end)" for label, final in zip(labels(runs), finals, strict=True)]
    legend = figure.legend(by_round.get_lines(), named, loc="outside lower center", ncols=min(len(runs), LEGEND_COLUMNS), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" in the name of a run is no formula
    figure.savefig(path, format="png")


def layer_bars(layers: Sequence[Mapping[str, Any]], path: pathlib.Path | IO[bytes]) -> None:
    """Draw the scores of the layers (`layers` of summary.json) as bars, those that were adapted in colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4, 0.35 * len(layers) + 2), 3), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    colours = [COLOURS[0] if layer["adapted"] else "lightgray" for layer in layers]
    axes.bar(range(len(layers)), [layer["score"] for layer in layers], color=colours)
    axes.set_xticks(range(len(layers)), [str(layer["layer"]) for layer in layers])
    axes.set_title("squared gradient of each layer; adapted in colour", fontsize=11, loc="left")
    axes.set_xlabel("layer")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def metric_by_round(run: Run) -> Points:
    """(round, primary metric), for the rounds that were evaluated."""
    return _finite((record.round, record.metrics.get(run.primary_metric)) for record in run.rounds)


def metric_by_bytes(run: Run) -> Points:
    """(bytes up and down so far, primary metric): what the accuracy cost."""
    spent = itertools.accumulate(record.bytes_up + record.bytes_down for record in run.rounds)
    return _finite((count, record.metrics.get(run.primary_metric)) for count, record in zip(spent, run.rounds, strict=True))


def loss_by_round(run: Run) -> Points:
    """(round, training loss), for the rounds that trained."""
    return _finite((record.round, record.loss) for record in run.rounds)


def _finite(points: Any) -> Points:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _panel(axes: Axes, lines: Sequence[Points], title: str, below: str) -> None:
    looks = itertools.cycle(itertools.product(STYLES, COLOURS))
    for points, (style, colour) in zip(lines, looks, strict=False):
        marker = "o" if len(points) <= FEW_POINTS else ""
        x, y = [point[0] for point in points], [point[1] for point in points]
        axes.plot(x, y, linestyle=style, color=colour, marker=marker, markersize=3.5, linewidth=1.6)
    if not any(lines):
        axes.text(0.5, 0.5, "nothing was measured", ha="center", va="center", transform=axes.transAxes, color="gray")
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.set_xlabel(below)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
