"""The report on finished runs: one HTML page, and for several runs the same comparison as Markdown and CSV.

Written from run folders alone (`runs.py`), long after the last round; `page.py` makes the HTML, `curves.py` the pictures.
"""

from __future__ import annotations

import csv
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import yaml

from fedpeft import page
from fedpeft.curves import curves, layer_bars
from fedpeft.records import RoundRecord
from fedpeft.runs import Run, differing, labels
from fedpeft.units import format_bytes, format_number, format_seconds, headline, one_line, total_seconds

Table = tuple[list[str], list[list[str]]]
"""Column names and rows of cells, as plain text: each output escapes it in its own way."""


class Result(NamedTuple):
    """What came out of a run, for programs (`key`) and for people (`said`, `say`)."""

    key: str
    said: str
    value: Callable[[Mapping[str, Any]], Any]  # from summary.json
    say: Callable[[Any], str]


RESULTS = (
    Result("metric", "metric", lambda s: s["primary_metric"], str),
    Result("initial", "before", lambda s: s["initial"].get(s["primary_metric"]), format_number),
    Result("final", "after", lambda s: s["metrics"].get(s["primary_metric"]), format_number),
    Result("best", "best", lambda s: s["best"].get(s["primary_metric"]), format_number),
    Result("best_round", "in round", lambda s: s["best"].get("round"), str),
    Result("rounds_completed", "rounds", lambda s: s["rounds_completed"], str),
    Result("bytes_up", "up", lambda s: s["bytes_up"], format_bytes),
    Result("bytes_down", "down", lambda s: s["bytes_down"], format_bytes),
    Result("seconds", "time", lambda s: total_seconds(s["seconds"]), format_seconds),
    Result("trainable_parameters", "trained", lambda s: s["trainable_parameters"], "{:,}".format),
    Result("rejected_updates", "rejected updates", lambda s: s["rejected_updates"], str),
    Result("epsilon", "epsilon", lambda s: (s["privacy"] or {}).get("epsilon"), format_number),
)


def write_report(runs: Sequence[Run], out_dir: pathlib.Path) -> list[pathlib.Path]:
    """Write report.html on the runs, and with several also report.md and runs.csv. Returns the files, the page first."""
    out_dir.mkdir(parents=True, exist_ok=True)
    texts = {"report.html": _html(runs)}
    if len(runs) > 1:
        texts |= {"report.md": _markdown(runs), "runs.csv": _csv(runs)}
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8", newline="")
    return [out_dir / name for name in texts]


def _html(runs: Sequence[Run]) -> str:
    drawn = io.BytesIO()
    curves(runs, drawn)
    overview = page.picture(drawn.getvalue(), "the primary metric against rounds and bytes, and the training loss")
    if len(runs) == 1:
        return page.page(f"{runs[0].summary['name']}: a federated run", page.lead(_what(runs[0])), *_about(runs[0], overview))
    names = labels(runs)
    each = (page.fold(name, page.lead(_what(run)), *_about(run, "")) for name, run in zip(names, runs, strict=True))
    return page.page(
        f"{len(runs)} federated runs compared",
        page.section("Comparison", page.table(*comparison(runs))),
        page.section("Curves", overview),
        page.section("The runs", *each),
    )


def _about(run: Run, overview: str) -> list[str]:
    """The page's parts on one run."""
    split = run.folder / "partition.png"
    rejections = rejection_table(run)
    return [
        page.cards(headline(run.summary)),
        page.section("Curves", overview),
        page.section("Privacy", page.table(*_facts(run.summary["privacy"])) if run.summary["privacy"] else ""),
        page.section(
            "Who holds what", page.picture(split.read_bytes(), "examples of each class at each client") if split.is_file() else ""
        ),
        page.section("Layers", _layers(run.summary.get("layers"))),
        page.section("Rounds", page.table(*round_table(run))),
        page.section("Rejected updates", page.table(*rejections) if rejections[1] else ""),
        page.section(
            "Config and versions",
            page.fold("The config, as resolved", page.verbatim(yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True))),
            page.table(*_facts(run.summary["versions"])),
        ),
    ]


def _layers(layers: Sequence[Mapping[str, Any]] | None) -> str:
    """Which layers the adapter chose, where it chose."""
    if not layers:
        return ""
    drawn = io.BytesIO()
    layer_bars(layers, drawn)
    return page.picture(drawn.getvalue(), "the scores of the layers before round 1, and which of them are adapted")


def _what(run: Run) -> str:
    """What the run was, in a sentence."""
    summary = run.summary
    model, data = (run.config.get(key) or {} for key in ("model", "data"))
    return (
        f"{summary['strategy']} with {summary['adapter']} on {model.get('name', 'a model')}, fine-tuned on {data.get('name', 'its data')}, "
        f"seed {summary['seed']}; {summary['rounds_completed']} rounds; from {run.folder}"
    )


def round_table(run: Run) -> Table:
    """A row a round, with what was rejected and why; columns that no round fills are left out."""
    metrics = list(dict.fromkeys(name for record in run.rounds for name in record.metrics))
    extra = list(dict.fromkeys(name for record in run.rounds for name in record.report))
    spent = any(record.epsilon is not None for record in run.rounds)
    head = [
        "round",
        "accepted",
        "rejected",
        "loss",
        *metrics,
        "up",
        "down",
        "norm of the move",
        "time",
        *(["epsilon"] if spent else []),
        *extra,
    ]

    def row(record: RoundRecord) -> list[str]:
        return [
            "before training" if record.round == 0 else str(record.round),
            f"{record.accepted} of {record.asked}" if record.asked else "-",
            ", ".join(f"{count} {reason}" for reason, count in sorted(record.rejected.items())) or "-",
            format_number(record.loss),
            *(format_number(record.metrics.get(name)) for name in metrics),
            format_bytes(record.bytes_up),
            format_bytes(record.bytes_down),
            format_number(record.update_norm),
            format_seconds(total_seconds(record.seconds)),
            *([format_number(record.epsilon)] if spent else []),
            *(format_number(record.report.get(name)) for name in extra),
        ]

    return head, [row(record) for record in run.rounds]


def rejection_table(run: Run) -> Table:
    """Every client whose update was not taken, and why."""
    return ["round", "client", "reason"], [
        [str(record.round), client, reason] for record in run.rounds for client, reason in sorted(record.rejected_clients.items())
    ]


def comparison(runs: Sequence[Run]) -> Table:
    """A row a run: the settings in which they differ, then what came out."""
    settings = differing(runs)
    head = ["run", *settings, *(column.said for column in RESULTS)]
    rows = [
        [name, *(values[index] for values in settings.values()), *(column.say(column.value(run.summary)) for column in RESULTS)]
        for index, (name, run) in enumerate(zip(labels(runs), runs, strict=True))
    ]
    return head, rows


def _csv(runs: Sequence[Run]) -> str:
    """The comparison for programs: plain numbers, seconds and bytes."""
    settings = differing(runs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "folder", *settings, *(column.key for column in RESULTS)])
    for index, (name, run) in enumerate(zip(labels(runs), runs, strict=True)):
        writer.writerow(
            [name, run.folder, *(values[index] for values in settings.values()), *(column.value(run.summary) for column in RESULTS)]
        )
    return text.getvalue()


def _markdown(runs: Sequence[Run]) -> str:
    parts = [f"# {len(runs)} federated runs compared", _markdown_table(*comparison(runs))]
    for name, run in zip(labels(runs), runs, strict=True):
        parts += [f"## {_markdown_text(name)}", _markdown_text(_what(run)), _markdown_table(["what", "value"], headline(run.summary))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_markdown_text(cell) for cell in line)} |" for line in lines)


def _markdown_text(text: str) -> str:
    """Text of a run as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(one_line(text), quote=False))


def _facts(values: Mapping[str, Any]) -> Table:
    return ["what", "value"], [[key.replace("_", " "), _said(value)] for key, value in values.items()]


def _said(value: Any) -> str:
    """A value of summary.json in words; many numbers as their range."""
    if isinstance(value, Mapping) and value and all(isinstance(item, int | float) for item in value.values()):
        return f"{min(value.values()):.4g} to {max(value.values()):.4g}, over {len(value):,}"
    if isinstance(value, list | tuple):
        return "; ".join(_said(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
