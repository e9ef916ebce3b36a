"""What a person sees while a run goes on: on a terminal, in a log file, and as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fedpeft import screen
from fedpeft.config import Config
from fedpeft.records import RoundRecord
from fedpeft.units import format_bytes, format_number, format_seconds, headline, one_line, total_seconds

ROUND = RoundRecord(
    round=3,
    asked=10,
    accepted=9,
    rejected={"not finite": 1},
    rejected_clients={"4": "values that are not finite"},
    loss=1.25,
    metrics={"f1": 0.5, "accuracy": 0.8125},
    examples=900,
    bytes_up=2_000_000,
    bytes_down=1_000_000,
    update_norm=0.5,
    client_update_norms={"1": 0.5},
    seconds={"train": 2.0, "evaluate": 1.0},
)
BEFORE = dataclasses.replace(ROUND, round=0, asked=0, accepted=0, rejected={}, rejected_clients={}, loss=None)
SUMMARY = {
    "primary_metric": "accuracy",
    "initial": {"accuracy": 0.24},
    "metrics": {"accuracy": 0.81},
    "best": {"round": 2, "accuracy": 0.83},
    "trainable_parameters": 1000,
    "base_parameters": 100_000,
    "rounds_completed": 3,
    "stopped_because": "all rounds are done",
    "bytes_up": 2_500_000,
    "bytes_down": 1_500_000,
    "seconds": {"train": 60.0, "evaluate": 20.0},
    "rejected_updates": 7,
    "privacy": None,
}


def _facts(out: pathlib.Path) -> dict:
    sizes = {"train_examples": 1865, "test_examples": 467, "trainable_parameters": 1000, "base_parameters": 100_000}
    return {"clients": 10, **sizes, "out": out, "primary_metric": "accuracy"}


def _show(seen: screen.Screen, out: pathlib.Path, *records: RoundRecord, note: str = "") -> None:
    with seen:
        seen.started(Config(), _facts(out))
        for record in records:
            seen.round_done(record, 3)
        if note:
            seen.note(note)
        seen.finished(SUMMARY, out)


def _rich(width: int = 100) -> tuple[screen.Rich, io.StringIO]:
    text = io.StringIO()
    return screen.Rich(Console(file=text, force_terminal=True, width=width)), text


def _without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_log_file_gets_one_plain_line_an_event(tmp_path):
    text = io.StringIO()
    _show(screen.Plain(text), tmp_path, BEFORE, ROUND)
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("quickstart: 10 clients with 1,865 examples, 467 to test on; fedavg with lora on minilm")
    assert lines[1] == "before training: accuracy 0.8125, 2 MB up, 1 MB down, 3 s"
    assert lines[2] == "round 3/3: loss 1.2500, accuracy 0.8125, 9 of 10 clients, 2 MB up, 1 MB down, 3 s"
    assert lines[3] == "accuracy: 0.2400 -> 0.8100"
    assert lines[-1] == f"run folder: {tmp_path}"
    assert "\x1b" not in text.getvalue()
    assert "\r" not in text.getvalue()


def test_what_was_written_is_where_the_last_lines_say(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "summary.json").touch()
    text = io.StringIO()
    _show(screen.Plain(text), tmp_path)
    assert text.getvalue().splitlines()[-2:] == [f"adapter: {tmp_path / 'adapter'}", f"summary: {tmp_path / 'summary.json'}"]


def test_a_terminal_gets_a_bar_with_loss_metric_bytes_so_far_and_time_left(tmp_path, monkeypatch):
    seen, text = _rich()
    clock = iter([100.0, 110.0, 120.0, 130.0])
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(clock))
    with seen:
        seen.started(Config(), _facts(tmp_path))
        for number, record in enumerate([BEFORE, ROUND, ROUND, ROUND]):
            seen.round_done(dataclasses.replace(record, round=number), 3)
            row = _without_codes(text.getvalue()).replace("\r", "\n").strip().splitlines()[-1]
            expected = ["before training", "round 1/3", "round 2/3", "round 3/3"][number]
            assert row.startswith(expected)
            assert "accuracy 0.8125" in row
            assert f"{3 * (number + 1)} MB" in row, "bytes up and down of all rounds so far"
            assert ("loss 1.2500" in row) == (number > 0)
            assert re.findall(r"(\d+ s) left", row) == [[], ["20 s"], ["10 s"], []][number]


def test_a_resumed_run_is_timed_from_the_round_it_resumed_at(tmp_path, monkeypatch):
    seen, text = _rich()
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(clock))
    with seen:
        seen.started(Config(), _facts(tmp_path))
        for number in (90, 91):
            seen.round_done(dataclasses.replace(ROUND, round=number), 100)
        assert "1 min 30 s left" in _without_codes(text.getvalue())


def test_the_bar_fits_a_terminal_of_eighty_columns(tmp_path):
    seen, text = _rich(width=80)
    with seen:
        seen.started(Config(), _facts(tmp_path))
        seen.round_done(dataclasses.replace(ROUND, round=1), 3)
        seen.round_done(dataclasses.replace(ROUND, round=2), 3)
    rows = [row for row in _without_codes(text.getvalue()).replace("\r", "\n").splitlines() if row.startswith("round 2/3")]
    assert rows
    assert all(len(row) <= 80 and "…" not in row for row in rows)


def test_the_table_at_the_end_holds_the_headline(tmp_path):
    seen, text = _rich()
    _show(seen, tmp_path, ROUND)
    shown = _without_codes(text.getvalue())
    for what in ("0.2400 -> 0.8100", "0.8300 in round 2", "2.5 MB up, 1.5 MB down", "1 min 20 s", "rejected updates", " 7 ", tmp_path.name):
        assert what in shown, what


def test_a_run_that_fails_leaves_the_terminal_with_its_cursor_and_no_bar_thread(tmp_path):
    seen, text = _rich()
    with contextlib.suppress(KeyboardInterrupt), seen:
        seen.started(Config(), _facts(tmp_path))
        assert seen.progress.live.is_started
        raise KeyboardInterrupt
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")
    assert not seen.progress.live.is_started


def test_text_from_a_client_is_shown_as_it_is_and_cannot_steer_the_terminal(tmp_path):
    hostile = "client 4: [bold]layer[/bold] [/] \x1b[2J\x1b]0;owned\x07\nround 9/9"
    seen, rich_text = _rich()
    _show(seen, tmp_path, note=hostile)
    plain_text = io.StringIO()
    _show(screen.Plain(plain_text), tmp_path, note=hostile)
    for text in (rich_text.getvalue(), plain_text.getvalue()):
        assert "client 4: [bold]layer[/bold] [/] [2J ]0;owned round 9/9" in text
        assert "\x1b[2J" not in text
        assert "\x1b]0" not in text


def test_json_is_one_object_a_line_and_nothing_else(tmp_path, capsys):
    _show(screen.choose(json=True), tmp_path, BEFORE, ROUND, note="two\nlines")
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["event"] for event in events] == ["started", "round", "round", "note", "finished"]
    assert events[0]["clients"] == 10
    assert events[0]["out"] == str(tmp_path)
    assert events[0]["config"] == Config().as_dict()
    assert events[2] == {"event": "round", "num_rounds": 3, **dataclasses.asdict(ROUND)}
    assert events[3]["text"] == "two\nlines"
    assert events[4]["summary"] == SUMMARY
    assert err == ""


def test_json_has_null_for_what_is_not_finite(capsys):
    screen.Json().round_done(dataclasses.replace(ROUND, loss=math.nan, metrics={"accuracy": math.inf}), 3)
    line = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"] is None
    assert line["metrics"] == {"accuracy": None}


def test_a_loss_that_is_not_a_number_is_said_aloud(tmp_path):
    text = io.StringIO()
    seen, rich_text = _rich()
    diverged = dataclasses.replace(ROUND, loss=math.nan, metrics={})
    _show(screen.Plain(text), tmp_path, diverged)
    _show(seen, tmp_path, diverged)
    assert "round 3/3: loss NaN, 9 of 10 clients" in text.getvalue()
    assert "loss NaN" in rich_text.getvalue()


def test_without_a_named_metric_the_first_one_is_shown(tmp_path):
    text = io.StringIO()
    seen = screen.Plain(text)
    facts = _facts(tmp_path)
    del facts["primary_metric"]
    seen.started(Config(), facts)
    seen.round_done(ROUND, 3)
    assert "f1 0.5000" in text.getvalue()


@pytest.mark.parametrize(
    ("json", "terminal", "term", "expected"),
    [
        (True, True, "xterm", screen.Json),
        (False, True, "xterm", screen.Rich),
        (False, True, "dumb", screen.Plain),
        (False, False, "xterm", screen.Plain),
    ],
)
def test_the_screen_follows_from_the_option_and_the_terminal(monkeypatch, json, terminal, term, expected):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", term)
    assert type(screen.choose(json=json)) is expected


def test_importing_the_screen_loads_neither_rich_nor_torch_nor_numpy():
    code = "import sys, fedpeft.screen; print(sorted({'rich', 'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (999_499, "999 kB"),
        (999_999, "1 MB"),
        (5e6, "5 MB"),
        (1.234e9, "1.23 GB"),
        (5e18, "5000 PB"),
    ],
)
def test_bytes_have_three_digits_and_never_a_power_of_ten(count, said):
    assert format_bytes(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (7199, "2 h 00 min"), (math.nan, "-"), (None, "-")],
)
def test_seconds_never_round_to_sixty(seconds, said):
    assert format_seconds(seconds) == said


def test_numbers_at_the_edges():
    assert [format_number(value) for value in (None, math.nan, math.inf, 0.0, 1e-7, -0.5, 99999.5)] == [
        "-",
        "NaN",
        "inf",
        "0.0000",
        "1e-07",
        "-0.5000",
        "100000",
    ]


def test_a_total_is_not_counted_twice():
    assert total_seconds({"train": 2.0, "total": 3.0}) == 3.0
    assert total_seconds({"train": 2.0, "evaluate": 1.0}) == 3.0
    assert total_seconds({}) == 0.0


def test_privacy_is_in_the_headline_where_there_is_some():
    private = {**SUMMARY, "privacy": {"unit": "example", "epsilon": 3.0, "delta": 1e-5}}
    assert "privacy" not in dict(headline(SUMMARY))
    assert dict(headline(private))["privacy"] == "epsilon 3 at delta 1e-05, unit example"


def test_one_line_keeps_what_can_be_read():
    assert one_line("  Größe\t\x00日本\u202e\r\n x ") == "Größe 日本 x"
