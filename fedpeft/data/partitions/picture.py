"""partition.png: who holds how much of which class, for a person to see at a glance."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMED_CLIENTS = 60  # more rows than this: sorted by their largest class, and without names
NAMED_CLASSES = 100
CELLS_WITH_NUMBERS = 15  # as many columns at most, so that the numbers fit
LONGEST_NAME = 24  # characters of a name that are shown


def draw(counts: NDArray[np.int64], label_names: Sequence[str], client_names: Sequence[str], path: pathlib.Path) -> None:
    """Draw `counts` [clients, classes]: colour is a class's share of the client's examples, bars are the clients' sizes.

    Many clients are sorted by their largest class and lose their names; without `label_names` a class is its number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

    clients, classes = counts.shape
    labels = [_short(name) for name in label_names] or [str(label) for label in range(classes)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = clients > NAMED_CLIENTS
    if many:
        order = np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))
        counts, shares = counts[order], shares[order]

    numbers = classes <= CELLS_WITH_NUMBERS and not many
    inches_wide = float(np.clip(classes * (0.62 if numbers else 0.17), 3.5, 15))
    inches_high = float(np.clip(clients * 0.3, 3, 8))
    figure = Figure(figsize=(inches_wide + 4.8, inches_high + 2.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=[inches_wide, 2.2])
    # Small shares stay visible on a square-root scale: 77 even classes are 1% each. A masked cell stays white.
    colours = LinearSegmentedColormap.from_list("shares", ["#dbe9f6", "#6aaed6", "#2070b4", "#08306b"])
    image = cells.imshow(np.ma.masked_equal(shares, 0), aspect="auto", cmap=colours, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if numbers:
        _write_numbers(cells, counts, shares)

    _tick(cells.xaxis, labels if classes <= NAMED_CLASSES else [], rotation=_rotation(labels, inches_wide))
    _tick(cells.yaxis, [] if many else [_short(name) for name in client_names])
    cells.set_xlabel("class" if classes <= NAMED_CLASSES else f"{classes} classes, in their order")
    cells.set_ylabel(f"{clients:,} clients, sorted by largest class" if many else "client")
    if not many:
        cells.hlines(np.arange(1, clients) - 0.5, -0.5, classes - 0.5, color="#e4e4e4", linewidth=0.5)
        cells.vlines(np.arange(1, classes) - 0.5, -0.5, clients - 0.5, color="#e4e4e4", linewidth=0.5)

    sizes = counts.sum(axis=1)
    if many:  # one outline: thousands of bars take as many seconds to draw as the rest of a small run
        edges = np.arange(clients + 1) - 0.5
        bars.fill_betweenx(edges, 0, np.append(sizes, sizes[-1]), step="post", color="#4a4a4a", linewidth=0)
        bars.set_ylim(clients - 0.5, -0.5)
    else:
        bars.barh(np.arange(clients), sizes, height=0.75, color="#4a4a4a")
    bars.set_xlabel("examples")
    bars.set_xlim(0, max(1, sizes.max()) * (1 if many else 1.35))
    bars.locator_params(axis="x", nbins=3, integer=True)
    bars.xaxis.set_major_formatter("{x:,.0f}")
    bars.tick_params(axis="y", left=False, labelleft=False)
    bars.spines[["top", "right"]].set_visible(False)
    if not many:
        for client, size in enumerate(sizes):
            bars.annotate(f"{size:,}", (size, client), (3, 0), textcoords="offset points", va="center", fontsize=8)
    legend = figure.colorbar(image, ax=[cells, bars], shrink=min(1.0, 3.5 / inches_high), pad=0.02, ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    legend.ax.set_yticklabels(["0%", "1%", "10%", "25%", "50%", "100%"])
    legend.set_label("share of the client's examples (white: none)")
    if sizes.min() == sizes.max():
        each = f"every client has {_count(sizes.max(), 'example')}"
    else:
        each = f"a client has {sizes.min():,} to {sizes.max():,} examples (median {np.median(sizes):,.0f})"
    title = f"{_count(sizes.sum(), 'example')}, {_count(clients, 'client')}, {_count(classes, 'class', 'classes')}\n{each}"
    figure.suptitle(title, fontsize=11)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class named in a script that the font lacks
        figure.savefig(path)


def _write_numbers(cells: Any, counts: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    for client, label in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[client, label] > 0.35 else "black"
        cells.text(label, client, f"{counts[client, label]:,}", ha="center", va="center", fontsize=8, color=colour)


def _tick(axis: Any, names: Sequence[str], rotation: int = 0) -> None:
    axis.set_ticks(range(len(names)), names, rotation=rotation, fontsize=8, rotation_mode="anchor")
    if rotation:
        axis.set_tick_params(pad=6)
        for label in axis.get_ticklabels():
            label.set(ha="right", va="center" if rotation == 90 else "top")
    for label in axis.get_ticklabels():
        label.set_parse_math(False)  # a "$" in a name is a dollar


def _rotation(labels: Sequence[str], inches: float) -> int:
    """Level where the names can stand side by side (a character is about 0.07 inch wide), slanted where there is room, else upright."""
    if max(map(len, labels), default=0) * 0.07 < 0.9 * inches / max(len(labels), 1):
        return 0
    return 40 if len(labels) <= CELLS_WITH_NUMBERS else 90


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
