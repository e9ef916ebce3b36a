"""What a person sees while a run goes on: the round loop tells a `Screen` of events, and nothing important exists only here.

`choose` picks among three: a progress bar (terminal), a plain line a round (no terminal), a JSON object a line (--json).
A screen is a context manager, so that a run that stops early leaves the terminal as it was:

    with screen.choose(json=False) as seen:
        seen.started(config, facts)   ->   seen.round_done(record, num_rounds) ...   ->   seen.finished(summary, out)
"""

from __future__ import annotations

import abc
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Self, TextIO

from fedpeft.units import format_bytes, format_number, format_seconds, headline, one_line, total_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from fedpeft.config import Config
    from fedpeft.records import RoundRecord

Facts = Mapping[str, Any]
"""What is known when training begins: clients, train_examples, test_examples, trainable_parameters, base_parameters, out (the run
folder), and, where the task names one, primary_metric (else the first metric of a round is shown)."""


class Screen(abc.ABC):
    """What a run tells a person, event by event."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        """Leave the terminal as it was; also called when a run fails."""
        return None

    @abc.abstractmethod
    def started(self, config: Config, facts: Facts) -> None:
        """Data and model are there; round 0 comes next."""

    @abc.abstractmethod
    def round_done(self, record: RoundRecord, num_rounds: int) -> None:
        """A round is over; round 0 is what was measured before training."""

    @abc.abstractmethod
    def note(self, text: str) -> None:
        """Something worth a line of its own: a rejected client, an engine that fell back."""

    @abc.abstractmethod
    def finished(self, summary: Mapping[str, Any], out: pathlib.Path) -> None:
        """The run folder `out` is complete."""


def choose(json: bool) -> Screen:
    """The screen for this process: `Json` when asked for, `Rich` on a terminal, else `Plain`."""
    if json:
        return Json()
    return Rich() if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" else Plain()


class Plain(Screen):
    """One line an event: for a log file or a pipe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.facts: Facts = {}

    def started(self, config: Config, facts: Facts) -> None:
        """Who takes part, with what, and where it goes."""
        self.facts = facts
        self.note(_opening(config, facts))

    def round_done(self, record: RoundRecord, num_rounds: int) -> None:
        """Loss, metric, clients, bytes and seconds of this round."""
        parts = [_measured(record, self.facts)]
        if record.round:
            parts.append(f"{record.accepted} of {record.asked} clients")
        parts.append(f"{format_bytes(record.bytes_up)} up, {format_bytes(record.bytes_down)} down")
        parts.append(format_seconds(total_seconds(record.seconds)))
        self.note(f"{_title(record.round, num_rounds)}: {', '.join(part for part in parts if part)}")

    def note(self, text: str) -> None:
        """The text as one line, whatever it holds."""
        print(one_line(text), file=self.stream, flush=True)

    def finished(self, summary: Mapping[str, Any], out: pathlib.Path) -> None:
        """The headline, a line each, and where things are."""
        for name, value in (*headline(summary), *_places(out)):
            self.note(f"{name}: {value}")


class Json(Screen):
    """One JSON object a line with an `event`, for programs. What is not finite becomes null: JSON has no NaN."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout

    def _say(self, event: str, **facts: Any) -> None:
        line = json.dumps(_finite({"event": event, **facts}), default=str, allow_nan=False)
        print(line, file=self.stream, flush=True)

    def started(self, config: Config, facts: Facts) -> None:
        """The facts, and the whole config."""
        self._say("started", name=config.name, num_rounds=config.strategy.num_rounds, **facts, config=config.as_dict())

    def round_done(self, record: RoundRecord, num_rounds: int) -> None:
        """The line of rounds.jsonl."""
        self._say("round", num_rounds=num_rounds, **asdict(record))

    def note(self, text: str) -> None:
        """The text as it is."""
        self._say("note", text=text)

    def finished(self, summary: Mapping[str, Any], out: pathlib.Path) -> None:
        """The whole summary."""
        self._say("finished", out=out, summary=summary)


class Rich(Screen):
    """A progress bar over the rounds, and a short table at the end."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = console or Console()
        columns = ("{task.description}", "{task.fields[measured]}", "{task.fields[traffic]}", "{task.fields[left]}")
        title, measured, traffic, left = (TextColumn(text, markup=False) for text in columns)
        self.progress = Progress(
            title, BarColumn(bar_width=12), measured, traffic, TimeElapsedColumn(), left, console=self.console, refresh_per_second=2
        )
        self.facts: Facts = {}
        self.bytes = 0
        self.first: tuple[int, float] | None = None  # the first round this process saw, and when: a resumed run does not begin at 0

    def __exit__(self, *reason: object) -> None:
        self.progress.stop()

    def started(self, config: Config, facts: Facts) -> None:
        """Who takes part, then an empty bar."""
        self.facts = facts
        self.note(_opening(config, facts))
        self.progress.add_task("before training", total=config.strategy.num_rounds, measured="", traffic="", left="")
        self.progress.start()

    def round_done(self, record: RoundRecord, num_rounds: int) -> None:
        """Move the bar; bytes are those of all rounds so far."""
        self.bytes += record.bytes_up + record.bytes_down
        self.progress.update(
            self.progress.task_ids[0],
            completed=record.round,
            total=num_rounds,
            description=_title(record.round, num_rounds),
            measured=_measured(record, self.facts),
            traffic=format_bytes(self.bytes),
            left=self._left(record.round, num_rounds),
            refresh=True,
        )

    def _left(self, round: int, num_rounds: int) -> str:
        """Rounds to go at the pace of those seen since the first."""
        now = time.monotonic()
        self.first = self.first or (round, now)
        done = round - self.first[0]
        if not done or round == num_rounds:
            return ""
        return f"{format_seconds((now - self.first[1]) / done * (num_rounds - round))} left"

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(one_line(text), markup=False, highlight=False)

    def finished(self, summary: Mapping[str, Any], out: pathlib.Path) -> None:
        """The headline and where things are, as a table."""
        from rich.table import Table
        from rich.text import Text

        self.progress.stop()
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in (*headline(summary), *_places(out)):
            table.add_row(Text(one_line(name)), Text(one_line(value)))
        self.console.print(table)


def _opening(config: Config, facts: Facts) -> str:
    trainable, base = facts["trainable_parameters"], facts["base_parameters"]
    held = "" if facts["train_examples"] is None else f" with {facts['train_examples']:,} examples"  # real clients keep that to themselves
    return (
        f"{config.name}: {facts['clients']:,} clients{held}, {facts['test_examples']:,} to test on; "
        f"{config.strategy.name} with {config.adapter.name} on {config.model.name}, {config.strategy.num_rounds} rounds; "
        f"{trainable:,} of {base:,} parameters trained ({trainable / max(base, 1):.2%}); results in {facts['out']}"
    )


def _title(round: int, num_rounds: int) -> str:
    return f"round {round}/{num_rounds}" if round else "before training"


def _measured(record: RoundRecord, facts: Facts) -> str:
    """Loss and primary metric, as far as they were measured."""
    primary = facts.get("primary_metric") or next(iter(record.metrics), None)
    parts = [] if record.loss is None else [f"loss {format_number(record.loss)}"]
    if primary in record.metrics:
        parts.append(f"{primary} {format_number(record.metrics[primary])}")
    return ", ".join(parts)


def _places(out: pathlib.Path) -> list[tuple[str, str]]:
    """What a person may want to open next, where it was written."""
    names = {"adapter": "adapter", "curves": "curves.png", "report": "report.html", "summary": "summary.json"}
    found = [(what, str(out / name)) for what, name in names.items() if (out / name).exists()]
    return found or [("run folder", str(out))]


def _finite(value: Any) -> Any:
    """`value` with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
