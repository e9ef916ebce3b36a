"""What privacy costs: the primary metric of a study against epsilon, where its arms differ in their privacy budget.

DIR/epsilon.png and a table in DIR/study.md: a line, or row, for the arms that differ in nothing but privacy. Without
privacy epsilon is infinite, and stands at the right.
"""

from __future__ import annotations

import itertools
import math
import pathlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedpeft.curves import COLOURS, STYLES
from fedpeft.intervals import Estimate, estimate
from fedpeft.runs import Run
from fedpeft.simulations.study_results import Cell, Results
from fedpeft.units import format_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PRIVACY = "privacy"
BUDGET = frozenset({"target_epsilon", "target_delta", "noise_multiplier"})  # what a budget is given by
Costs = Mapping[str, Mapping[float, Estimate]]
"""What arms have in common -> epsilon -> the metric over the finished seeds."""


def costs(results: Results) -> Costs:
    """The metric by budget; nothing when the finished arms have one budget. Arms without privacy stand in every line that
    differs from them in nothing else."""
    found: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    plain: dict[str, list[float]] = defaultdict(list)
    for cell in results.cells:
        if cell.run and cell.run.config[PRIVACY] is None:
            plain[_apart(cell)].append(cell.result("final"))
        elif cell.run:
            found[_apart(cell), _mechanism(cell.run)][epsilon(cell.run)].append(cell.result("final"))
    for arm, values in plain.items():
        for line in [line for (other, _), line in found.items() if other == arm] or [found[arm, ""]]:
            line[math.inf] += values
    if len({budget for line in found.values() for budget in line}) < 2:
        return {}
    several = Counter(arm for arm, _ in found)
    names = {(arm, how): f"{arm}, {how}" if several[arm] > 1 else arm for arm, how in found}
    return {names[key]: {budget: estimate(line[budget]) for budget in sorted(line)} for key, line in found.items()}


def epsilon(run: Run) -> float:
    """The budget of a run, or what it spent where it had none (what it would have, where noise was seeded); infinite without noise."""
    if run.config[PRIVACY] is None:
        return math.inf
    said = run.summary[PRIVACY] or {}
    found = run.config[PRIVACY]["target_epsilon"] or said.get("epsilon") or said.get("epsilon_if_noise_were_secret")
    return math.inf if found is None else float(found)


def table(found: Costs) -> tuple[list[str], list[list[str]]]:
    """Head and rows: an epsilon a column."""
    budgets = sorted({budget for line in found.values() for budget in line})
    rows = [[name, *(_said(line.get(budget)) for budget in budgets)] for name, line in found.items()]
    return ["epsilon", *("none" if math.isinf(budget) else f"{budget:g}" for budget in budgets)], rows


def draw(found: Costs, metric: str, path: pathlib.Path) -> None:
    """Draw the lines, each mean with its interval, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots()
    budgets = sorted({budget for line in found.values() for budget in line})
    looks = itertools.cycle(itertools.product(STYLES, COLOURS))
    drawn = []
    for number, (line, (style, colour)) in enumerate(zip(found.values(), looks, strict=False)):
        shift = 0.06 * (number - (len(found) - 1) / 2)  # so that intervals do not hide each other
        x = [budgets.index(budget) + shift for budget in line]
        half = [estimate.half_width or 0.0 for estimate in line.values()]
        means = [math.nan if estimate.mean is None else estimate.mean for estimate in line.values()]
        drawn.append(
            axes.errorbar(x, means, yerr=half, linestyle=style, color=colour, marker="o", markersize=3.5, linewidth=1.6, capsize=3)
        )
    _label(axes, budgets, metric)
    legend = figure.legend(
        [container.lines[0] for container in drawn], list(found), loc="outside lower center", ncols=min(3, len(found)), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, format="png")


def _label(axes: Axes, budgets: list[float], metric: str) -> None:
    axes.set_xticks(range(len(budgets)), ["none" if math.isinf(budget) else f"{budget:g}" for budget in budgets])
    axes.set_xlabel("epsilon of the whole run")
    axes.set_title(f"{metric}, mean and 95 % interval over the seeds", fontsize=11, loc="left", parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(cell: Cell) -> str:
    """An arm without its privacy."""
    kept = [value for key, value in cell.settings.items() if key.partition(".")[0] != PRIVACY]
    return ", ".join(kept) or "all"


def _mechanism(run: Run) -> str:
    """How a run was made private, its budget apart."""
    section = {key: value for key, value in run.config[PRIVACY].items() if key not in BUDGET and value is not None}
    return ", ".join(f"{PRIVACY}.{key}={value}" for key, value in sorted(section.items()))


def _said(found: Estimate | None) -> str:
    if found is None or found.mean is None:
        return "-"
    return format_number(found.mean) + (f" ± {format_number(found.half_width)}" if found.half_width is not None else "")
