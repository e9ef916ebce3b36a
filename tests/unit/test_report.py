"""Runs read back from their folders, and the page, Markdown, CSV and pictures that compare them."""

from __future__ import annotations

import base64
import csv
import dataclasses
import html.parser
import json
import math
import pathlib
import re

import pytest
import yaml

from fedpeft.curves import COLOURS, curves, loss_by_round, metric_by_bytes, metric_by_round
from fedpeft.errors import UserError
from fedpeft.records import RoundRecord
from fedpeft.report import write_report
from fedpeft.runs import Run, differing, labels, read_run, read_runs

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
VOID = {"meta", "img"}


def _record(number: int, accuracy: float, **changes) -> RoundRecord:
    record = RoundRecord(
        round=number,
        asked=4 if number else 0,
        accepted=4 if number else 0,
        rejected={},
        rejected_clients={},
        loss=2.0 / number if number else None,
        metrics={"accuracy": accuracy},
        examples=100,
        bytes_up=1000,
        bytes_down=500,
        update_norm=0.1,
        client_update_norms={},
        seconds={"train": 1.0},
    )
    return dataclasses.replace(record, **changes)


def write_run(folder: pathlib.Path, name: str = "quickstart", rounds=None, settings=None, **summary) -> Run:
    """A run folder as the round loop leaves it, with two rounds; returns it as read."""
    folder.mkdir(parents=True)
    records = [_record(0, 0.25), _record(1, 0.5), _record(2, 0.75)] if rounds is None else rounds
    whole = {
        "name": name,
        "strategy": "fedavg",
        "adapter": "lora",
        "seed": 0,
        "rounds_completed": len(records) - 1,
        "stopped_because": "all rounds are done",
        "primary_metric": "accuracy",
        "metrics": {"accuracy": 0.75},
        "initial": {"accuracy": 0.25},
        "best": {"round": 2, "accuracy": 0.75},
        "bytes_up": 3000,
        "bytes_down": 1500,
        "trainable_parameters": 1000,
        "base_parameters": 100_000,
        "privacy": None,
        "seconds": {"train": 3.0},
        "rejected_updates": 0,
        "versions": {"fedpeft": "0.1.0"},
        **summary,
    }
    config = {
        "name": name,
        "seed": 0,
        "model": {"name": "minilm"},
        "data": {"name": "docstrings"},
        "strategy": {"name": "fedavg"},
        **(settings or {}),
    }
    (folder / "summary.json").write_text(json.dumps(whole))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return read_run(folder)


class Page(html.parser.HTMLParser):
    """Reads a page as a browser would, and keeps what matters: tags in balance, attributes, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def _page(runs, folder) -> Page:
    page = Page(write_report(runs, folder)[0].read_text())
    assert page.open == [], "every tag is closed"
    return page


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    run = write_run(tmp_path / "run")
    assert run.rounds == (_record(0, 0.25), _record(1, 0.5), _record(2, 0.75))
    assert run.config["model"] == {"name": "minilm"}
    assert run.primary_metric == "accuracy"


def test_fields_of_a_later_version_are_passed_over(tmp_path):
    write_run(tmp_path / "run")
    lines = [{**json.loads(line), "weather": "fair"} for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    (tmp_path / "run/rounds.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert len(read_run(tmp_path / "run").rounds) == 3


def test_every_folder_that_is_no_run_is_named_in_one_line_each(tmp_path):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "killed")
    (tmp_path / "killed/summary.json").unlink()
    good = write_run(tmp_path / "good")
    with pytest.raises(UserError) as caught:
        read_runs([tmp_path / "none", tmp_path / "empty", good.folder, tmp_path / "killed"])
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(tmp_path / name) for name in ("none", "empty", "killed")]
    assert "is no folder" in lines[0]
    assert "is no run folder; allowed: a folder with summary.json, rounds.jsonl, config.yaml" in lines[1]
    assert "has no summary.json" in lines[2]
    assert "--resume" in lines[2]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", "{", "summary.json: is no JSON"),
        ("summary.json", "[]", "summary.json: holds a list"),
        ("summary.json", "{}", "summary.json: has no adapter, base_parameters"),
        ("rounds.jsonl", '{"round": 0}', "rounds.jsonl, line 1: has no accepted"),
        ("rounds.jsonl", '\n{"round', "rounds.jsonl, line 2: is no JSON"),
        ("config.yaml", "- a list", "config.yaml: holds no mapping"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, text, said):
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        read_run(tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1


def test_text_that_is_no_utf8_is_said_to_be_unreadable(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/summary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_run(tmp_path / "run")


def test_a_run_given_twice_is_one_run(tmp_path):
    write_run(tmp_path / "run")
    assert len(read_runs([tmp_path / "run", tmp_path / "run/../run"])) == 1


def test_labels_tell_runs_apart(tmp_path):
    a, b = write_run(tmp_path / "one", "a"), write_run(tmp_path / "two", "b")
    assert labels([a, b]) == ["a", "b"]
    same_name = write_run(tmp_path / "three", "a")
    assert labels([a, same_name]) == ["one", "three"]
    same_folder = write_run(tmp_path / "deeper/one", "a")
    assert labels([a, same_folder]) == [str(tmp_path / "one"), str(tmp_path / "deeper/one")]


def test_only_the_settings_that_differ_are_compared(tmp_path):
    a = write_run(tmp_path / "a", "a", settings={"strategy": {"name": "fedavg", "mu": 0.1}, "adapter": {"target_modules": ["query"]}})
    b = write_run(tmp_path / "b", "b", settings={"strategy": {"name": "fedprox"}, "adapter": {"target_modules": ["query", "value"]}})
    expected = {
        "strategy.name": ["fedavg", "fedprox"],
        "strategy.mu": ["0.1", "-"],
        "adapter.target_modules": ['["query"]', '["query", "value"]'],
    }
    assert differing([a, b]) == expected


def test_a_metric_is_drawn_against_all_bytes_that_were_sent(tmp_path):
    run = write_run(tmp_path / "run")
    assert metric_by_round(run) == [(0, 0.25), (1, 0.5), (2, 0.75)]
    assert metric_by_bytes(run) == [(1500, 0.25), (3000, 0.5), (4500, 0.75)]
    assert loss_by_round(run) == [(1, 2.0), (2, 1.0)]


def test_rounds_that_were_not_measured_leave_no_point_but_their_bytes_count(tmp_path):
    rounds = [_record(0, 0.25), _record(1, 0, metrics={}, loss=math.nan), _record(2, math.nan, loss=None), _record(3, 0.75)]
    run = write_run(tmp_path / "run", rounds=rounds)
    assert metric_by_round(run) == [(0, 0.25), (3, 0.75)]
    assert metric_by_bytes(run)[-1] == (6000, 0.75)
    assert [x for x, _ in loss_by_round(run)] == [3]


@pytest.mark.parametrize("count", [1, 6, 40])
def test_one_and_many_runs_give_a_picture_with_a_line_for_each(tmp_path, count):
    from matplotlib.image import imread

    runs = [write_run(tmp_path / f"run{index}", f"_$\\bad_{index}$", [_record(0, 0.0), _record(1, 0.1 * index)]) for index in range(count)]
    curves(runs if count > 1 else runs[0], tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")[..., :3]
    assert pixels.shape[1] > 1000
    assert pixels.shape[0] > 400
    for colour in COLOURS[:count]:
        wanted = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        assert (abs(pixels - wanted).max(axis=-1) < 0.02).sum() > 30, f"no line in {colour}"


@pytest.mark.parametrize("rounds", [[], [_record(0, math.nan)], [_record(0, 0.5)]])
def test_a_run_that_measured_nothing_still_has_a_report(tmp_path, rounds):
    run = write_run(tmp_path / "run", rounds=rounds, metrics={}, initial={}, best={})
    assert "- -> -" in _page([run], run.folder).text


def test_the_page_on_one_run_says_what_came_out(tmp_path):
    rejected = _record(
        2, 0.75, accepted=2, rejected={"not finite": 1, "stale round": 1}, rejected_clients={"3": "NaN in layer 0", "1": "round 1 again"}
    )
    run = write_run(tmp_path / "run", rounds=[_record(0, 0.25), _record(1, 0.5, epsilon=0.7, report={"rank": 8.0}), rejected])
    written = write_report([run], run.folder)
    assert written == [run.folder / "report.html"]
    assert not (run.folder / "runs.csv").exists()
    page = _page([run], run.folder)
    for said in (
        "fedavg with lora on minilm, fine-tuned on docstrings",
        "0.2500 -> 0.7500",
        "1 not finite, 1 stale round",
        "NaN in layer 0",
        "before training",
    ):
        assert said in page.text, said
    for said in ("rank", "8.0000", "0.7000", "2 of 4", "name: minilm", "0.1.0", "1,000 of 100,000"):
        assert said in page.text, said
    assert "Who holds what" not in page.text


def test_the_page_stands_alone(tmp_path):
    run = write_run(tmp_path / "run")
    (run.folder / "partition.png").write_bytes(PNG)
    page = _page([run], run.folder)
    sources = [value for name, value in page.attributes if name in {"src", "href", "action", "data"}]
    assert len(sources) == 2, "the curves and the partition"
    for source in sources:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2], validate=True).startswith(b"\x89PNG")
    assert base64.b64decode(sources[1].partition(",")[2]) == PNG
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    text = (run.folder / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text
    assert "@import" not in text


def test_nothing_a_person_or_a_client_wrote_becomes_markup(tmp_path):
    evil = "<script>alert('x')</script>\"><img src=x onerror=1>&amp;|[a](b)"
    rounds = [
        _record(0, 0.25, metrics={evil: 1.0, "accuracy": 0.2}),
        _record(1, 0.5, rejected={evil: 1}, rejected_clients={evil: evil}, report={evil: 1.0}),
    ]
    privacy = {"unit": evil, "epsilon": 3.0, "delta": 1e-5, "per_client": {"0": 1.0, "1": 3.0}, "assumptions": [evil, "honest server"]}
    words = {"strategy": evil, "adapter": evil, "stopped_because": evil, "versions": {evil: evil}, "privacy": privacy}
    odd = {"model": {"name": evil}, "data": {"name": evil}, "extra": {evil: evil}}
    runs = [write_run(tmp_path / f"run{index} <b>", evil, rounds, {**odd, "seed": index}, **words) for index in range(2)]
    for chosen, folder in ((runs[:1], runs[0].folder), (runs, tmp_path / "both")):
        page = _page(chosen, folder)
        assert not {"script", "b"} & set(page.tags)
        assert "onerror" not in {name for name, _ in page.attributes}
        assert page.tags.count("img") == 1
        assert evil in page.text, "shown as it is"
        assert "1 to 3, over 2" in page.text
    markdown = (tmp_path / "both/report.md").read_text()
    assert "<script" not in markdown
    assert "[a](b)" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:4]} == {len(re.findall(r"(?<!\\)\|", rows[1]))}, "no cell breaks its row"


def test_several_runs_are_compared_on_the_page_in_markdown_and_as_plain_numbers(tmp_path):
    a = write_run(tmp_path / "a", "first", settings={"partition": {"alpha": 0.1}})
    private = {"unit": "example", "epsilon": 3.0, "delta": 1e-5}
    b = write_run(
        tmp_path / "b", "second", settings={"partition": {"alpha": 10}}, metrics={"accuracy": 0.625}, privacy=private, bytes_up=12_345_678
    )
    assert write_report([a, b], tmp_path / "out/deep") == [
        tmp_path / "out/deep" / name for name in ("report.html", "report.md", "runs.csv")
    ]
    page = _page([a, b], tmp_path / "out/deep")
    assert page.tags.count("details") == 4, "each run and its config"
    for said in ("2 federated runs compared", "partition.alpha", "12.3 MB", "0.6250", "second"):
        assert said in page.text, said
    assert "| first | 0.1 | accuracy | 0.2500 | 0.7500 |" in (tmp_path / "out/deep/report.md").read_text()
    with (tmp_path / "out/deep/runs.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["epsilon"] == ""
    assert first["folder"] == str(a.folder)
    assert (second["run"], second["partition.alpha"], second["final"], second["bytes_up"], second["seconds"], second["epsilon"]) == (
        *("second", "10", "0.625", "12345678"),
        *("3.0", "3.0"),
    )
