"""A study as a person types it: mistakes first, kills that cost nothing, failures that are shown, settings picked without the test."""

import csv
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import yaml
from safetensors.numpy import load_file

from fedpeft import Config, UserError, simulate
from fedpeft.arrays import digest
from fedpeft.cli import main
from fedpeft.data import corpus
from fedpeft.runs import Run, read_run
from fedpeft.simulations import study_epsilon
from fedpeft.simulations.study_plan import plan
from fedpeft.simulations.study_results import Cell, Results
from fedpeft.tasks.sequence_classification import SequenceClassification

TWO_ARMS = ["--vary", "strategy.name=fedavg,ffa_lora"]
READ = SequenceClassification()
MOODY = """
import pathlib
from fedpeft.errors import Problem, RunStopped, UserError
from fedpeft.strategies.fedavg import FedAvg

class Moody(FedAvg):
    def combine(self, updates, received, at):
        if not (pathlib.Path(__file__).parent / "mended").exists():
            raise {error}
        return super().combine(updates, received, at)
"""


@pytest.fixture
def config_file(tiny_settings, tmp_path):
    """Two rounds in which the accuracy moves, and not in every arm alike."""
    training = {**tiny_settings["training"], "learning_rate": 2e-3, "max_steps": 4, "head_init": "class_statistics"}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**tiny_settings, "strategy": {"num_rounds": 2}, "training": training}))
    return file


@pytest.fixture
def study(config_file, tmp_path, capsys):
    """Runs a study in tmp_path/study; the exit code, what was printed and what was complained of."""

    def run(*words, out=tmp_path / "study"):
        code = main(["study", str(config_file), *map(str, words), "--out", str(out)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def rows(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def snapshot(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def complaints(err):
    return [line for line in err.splitlines() if line.startswith("fedpeft: ")]


def test_two_arms_and_two_seeds_make_four_runs_and_their_tables(study, config_file, tmp_path):
    code, out, err = study(*TWO_ARMS, "--seeds", 2, "--target", 0.9)
    assert code == 0, err
    folder = tmp_path / "study"
    results = rows(folder / "results.csv")
    assert [(row["arm"], row["strategy.name"], row["seed"], row["status"]) for row in results] == [
        ("fedavg", "fedavg", "0", "finished"),
        ("fedavg", "fedavg", "1", "finished"),
        ("ffa_lora", "ffa_lora", "0", "finished"),
        ("ffa_lora", "ffa_lora", "1", "finished"),
    ]
    curves = rows(folder / "curves.csv")
    for row in results:
        run = read_run(folder / "cells" / row["arm"] / f"seed-{row['seed']}")
        assert (run.summary["seed"], run.summary["strategy"]) == (int(row["seed"]), row["arm"])
        assert float(row["final"]) == run.summary["metrics"]["accuracy"]
        way = [line for line in curves if (line["arm"], line["seed"]) == (row["arm"], row["seed"])]
        assert [line["round"] for line in way] == ["0", "1", "2"]
        assert [float(line["value"]) for line in way] == [record.metrics["accuracy"] for record in run.rounds]
        assert int(way[-1]["bytes"]) == int(row["bytes_up"]) + int(row["bytes_down"]) > 0
        reached = next((line for line in way if float(line["value"]) >= 0.9), {"round": "", "bytes": ""})
        assert (row["rounds_to_target"], row["bytes_to_target"]) == (reached["round"], reached["bytes"])
    assert len({row["final"] for row in results}) > 1, "runs that could be told apart"
    page = (folder / "study.md").read_text()
    assert "# tiny: 2 arms, 2 seeds" in page
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert table[0] in out
    assert table[3] in out
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    alone = simulate(Config.load(config_file, ["strategy.name=ffa_lora", "seed=1"]), tmp_path / "alone")
    cell = folder / "cells" / "ffa_lora" / "seed-1" / "adapter" / "adapter_model.safetensors"
    assert digest(load_file(cell)) == digest(load_file(alone.adapter_dir / "adapter_model.safetensors"))


def test_a_finished_study_stays_as_it_is_and_takes_more_seeds(study, tmp_path):
    assert study(*TWO_ARMS, "--seeds", 1)[0] == 0
    cells, before = tmp_path / "study" / "cells", (tmp_path / "study" / "results.csv").read_text()
    kept = snapshot(cells)
    code, out, _ = study(*TWO_ARMS, "--seeds", 1)
    assert code == 0
    assert "2 of 2 cells are finished already" in out
    assert snapshot(cells) == kept
    assert (tmp_path / "study" / "results.csv").read_text() == before
    assert study(*TWO_ARMS, "--seeds", 2)[0] == 0
    after = snapshot(cells)
    assert kept.items() <= after.items()
    assert [row["seed"] for row in rows(tmp_path / "study" / "results.csv")] == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (["--vary", "strategy.name=fedavg,ro_lora"], "--vary"),
        ([*TWO_ARMS, "--tune", "training.max_grad_norm=1,2"], "--tune"),
        (["training.learning_rate=0.2", *TWO_ARMS], "training"),
    ],
)
def test_another_study_in_the_same_folder_is_refused_in_one_line(study, tmp_path, words, differs):
    short = ["strategy.num_rounds=1", "training.max_steps=1"]
    assert study(*short, *TWO_ARMS, "--seeds", 1)[0] == 0
    before = snapshot(tmp_path / "study")
    code, _, err = study(*short, *words, "--seeds", 1)
    assert code == 2
    (line,) = complaints(err)
    assert f"holds a study with another {differs};" in line
    assert snapshot(tmp_path / "study") == before


def test_a_folder_with_other_things_is_left_alone(study, tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.txt").write_text("chapter 1")
    code, _, err = study(*TWO_ARMS)
    assert code == 2
    assert "holds no study" in err
    assert [file.name for file in (tmp_path / "study").iterdir()] == ["thesis.txt"]


def without_time(file):
    """The rows but for seconds; bytes up carry the clients' seconds as text, whose digits vary."""
    found = rows(file)
    return [{key: value for key, value in row.items() if key not in ("seconds", "bytes_up")} for row in found], [
        pytest.approx(int(row["bytes_up"]), rel=1e-2) for row in found
    ]


def killed(words, out, victim):
    """Run the study until `victim` (arm, seed, round) is over, and kill it then; what lies in the cells."""
    command = [sys.executable, "-m", "fedpeft", "study", *words, "--out", str(out), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "started":
            cell = (event["name"], event["config"]["seed"])
        if event["event"] == "round" and (*cell, event["round"]) == victim:
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    return snapshot(out / "cells")


def test_a_study_killed_again_and_again_comes_to_the_same_results(study, config_file, tmp_path):
    words = ["strategy.num_rounds=4", *TWO_ARMS, "--seeds", "2"]
    out, straight = tmp_path / "killed", tmp_path / "straight"
    finished = {}
    for arm, seed, round in (("fedavg", 0, 0), ("fedavg", 1, 2)):
        there = killed([str(config_file), *words], out, (arm, seed, round))
        torn = out / "cells" / arm / f"seed-{seed}"
        assert not (torn / "summary.json").exists()
        assert len((torn / "rounds.jsonl").read_text().splitlines()) > round
        assert finished.items() <= there.items(), "what is finished is not touched"
        finished = {file: when for file, when in there.items() if torn not in file.parents}
    code, said, _ = study(*words, out=out)
    assert code == 0
    assert "resuming after round" in said
    assert finished.items() <= snapshot(out / "cells").items()
    assert study(*words, out=straight)[0] == 0
    assert without_time(out / "results.csv") == without_time(straight / "results.csv")
    for cell in (straight / "cells").glob("*/*/adapter/adapter_model.safetensors"):
        assert digest(load_file(out / cell.relative_to(straight))) == digest(load_file(cell))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("RunStopped('a bad day')", "a bad day"),
        ("UserError(Problem('moody.day', 'is bad'))", "moody.day: is bad"),
        ("ArithmeticError('a bad day')", "ArithmeticError: a bad day"),
    ],
)
def test_a_cell_that_fails_is_shown_and_tried_again_while_the_others_go_on(study, tmp_path, error, reason):
    (tmp_path / "moody.py").write_text(MOODY.format(error=error))
    words = ["--vary", f"strategy.name={tmp_path / 'moody.py'}:Moody,fedavg", "--seeds", 1]
    code, out, err = study(*words)
    assert code == 1
    assert "1 of 2 cells failed" in err
    assert "Traceback" not in err
    first, second = rows(tmp_path / "study" / "results.csv")
    assert (first["status"], first["final"], second["status"]) == ("failed", "", "finished")
    assert reason in first["reason"]
    assert f"failed: {reason}" in out
    page = (tmp_path / "study" / "study.md").read_text()
    assert reason in page[page.index("## Failed") :]
    folder = next((tmp_path / "study" / "cells").glob("*moody*/seed-0"))
    assert ("Traceback" in (folder / "failed.txt").read_text()) == error.startswith("Arithmetic")
    (tmp_path / "mended").touch()
    kept = snapshot(tmp_path / "study" / "cells" / "fedavg")
    assert study(*words)[0] == 0
    assert [row["status"] for row in rows(tmp_path / "study" / "results.csv")] == ["finished", "finished"]
    assert not (folder / "failed.txt").exists()
    assert "## Failed" not in (tmp_path / "study" / "study.md").read_text()
    assert snapshot(tmp_path / "study" / "cells" / "fedavg") == kept


def test_a_run_that_stops_before_its_end_is_a_failed_cell(study, tmp_path):
    code, _, _ = study("--vary", "strategy.max_update_norm=1e4,1e-9", "--seeds", 1)
    assert code == 1
    good, bad = rows(tmp_path / "study" / "results.csv")
    assert (good["status"], bad["status"], bad["final"]) == ("finished", "failed", "")
    assert "too few updates were accepted" in bad["reason"]
    (tmp_path / "study" / "cells" / "max_update_norm-1e-9" / "seed-0" / "failed.txt").unlink()  # as if killed just before it was written
    assert study("--vary", "strategy.max_update_norm=1e4,1e-9", "--seeds", 1)[0] == 1
    assert [row["status"] for row in rows(tmp_path / "study" / "results.csv")] == ["finished", "failed"]


def test_a_finished_cell_of_another_config_is_neither_taken_nor_overwritten(study, tmp_path):
    assert study("--seeds", 1)[0] == 0
    cell = tmp_path / "study" / "cells" / "base" / "seed-0"
    (cell / "config.yaml").write_text((cell / "config.yaml").read_text().replace("num_rounds: 2", "num_rounds: 3"))
    before = snapshot(cell)
    code, _, err = study("--seeds", 1)
    assert code == 2
    assert "holds a run with another config; delete that folder" in err
    assert snapshot(cell) == before


def test_every_mistake_of_every_arm_is_said_before_anything_runs(study, tmp_path):
    words = ["--vary", "strategy.name=fedavg,fedavgg", "--vary", "training.max_steps=2,-2", "--vary", "adapter.rr=1,2"]
    code, _, err = study(*words)
    lines = complaints(err)
    assert code == 2
    assert sum('did you mean "fedavg"?' in line for line in lines) == 4, "in each arm that has it, by name"
    assert sum("training.max_steps" in line and "got -2" in line for line in lines) == 4
    assert sum("adapter.rr (command line): unknown key" in line for line in lines) == 1, "what all arms have is said once"
    assert len(lines) == 9
    assert any(line.startswith("fedpeft: arm fedavg_max_steps--2_rr-1: training.max_steps") for line in lines)
    assert not (tmp_path / "study").exists()


def test_data_that_is_not_there_is_said_before_anything_runs(study, tmp_path):
    code, _, err = study("--vary", "partition.clients=2,1000", "--vary", f"data.name={tmp_path / 'gone.csv'},./gone/")
    assert code == 2
    assert {line.partition("there is no file ")[2].split(";")[0] for line in complaints(err)} == {str(tmp_path / "gone.csv"), "gone"}
    assert not (tmp_path / "study").exists()
    code, _, err = study("--vary", "partition.clients=2,1000")
    (line,) = complaints(err)
    assert line.startswith("fedpeft: arm clients-1000: partition.clients")


MISTAKES = {
    "no values": (["--vary", "strategy.name"], '--vary: "strategy.name" names nothing to go through'),
    "an empty value": (["--vary", "strategy.name=fedavg,"], "has an empty value"),
    "an open bracket": (["--vary", "adapter.target_modules=[query,[value]"], "opens a bracket or a quote"),
    "no seeds": (["--seeds", "0"], "--seeds: 0 leaves nothing to run"),
    "the seed as a setting": (["--vary", "seed=1,2"], "--vary: seed is the study's own to set; give --seeds"),
    "the split as a setting": (["--tune", "data.evaluate_on=test,validation"], "--tune: data.evaluate_on is the study's own"),
    "judged by what was picked by": (
        ["data.evaluate_on=validation", "--tune", "training.max_steps=1,2"],
        "would judge by what --tune picks by",
    ),
    "a key twice": (["--vary", "partition.alpha=1,2", "--tune", "partition.alpha=3,4"], "partition.alpha is given 2 times"),
    "a key in a section twice": (
        ["--vary", "strategy={num_rounds: 1},{}", "--vary", "strategy.num_rounds=1,2"],
        "is given 2 times",
    ),
    "the same arm twice": (["--vary", "training.learning_rate=0.01,1e-2"], "are the same run"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(study, tmp_path, name):
    words, says = MISTAKES[name]
    code, _, err = study(*words)
    assert code == 2
    (line,) = complaints(err)
    assert says in line
    assert not (tmp_path / "study").exists()


def test_arms_are_all_combinations_with_the_last_key_fastest():
    found = plan(None, [], ["strategy.name=fedavg,ffa_lora", "adapter.target_modules=[query],[query, value]"], seeds=2)
    assert [(arm.name, arm.settings) for arm in found.arms] == [
        ("fedavg_target_modules-query", {"strategy.name": "fedavg", "adapter.target_modules": "[query]"}),
        ("fedavg_target_modules-query-value", {"strategy.name": "fedavg", "adapter.target_modules": "[query, value]"}),
        ("ffa_lora_target_modules-query", {"strategy.name": "ffa_lora", "adapter.target_modules": "[query]"}),
        ("ffa_lora_target_modules-query-value", {"strategy.name": "ffa_lora", "adapter.target_modules": "[query, value]"}),
    ]
    assert [arm.candidates[0].config.adapter.settings["target_modules"] for arm in found.arms[:2]] == [["query"], ["query", "value"]]


def test_keys_of_a_section_change_together_and_leave_its_other_keys():
    vary = ["strategy={name: fedprox, mu: 1.0e-3},{name: fedavg, num_rounds: 7},{}"]
    configs = [arm.candidates[0].config.strategy for arm in plan(None, ["strategy.num_rounds=4"], vary).arms]
    assert [(config.name, config.num_rounds) for config in configs] == [("fedprox", 4), ("fedavg", 7), ("fedavg", 4)]
    assert configs[0].settings["mu"] == 1e-3


def test_names_of_arms_are_folders_of_their_own(tmp_path):
    long = "x" * 200
    found = plan(None, [], [f"data.name=/a/b.csv,a-b.csv,{long}1.csv,{long}2.csv", "data.columns.text='a,b',../.."])
    names = [arm.name for arm in found.arms]
    assert len(set(names)) == 8
    for name in names:
        (tmp_path / name).mkdir()
        assert (tmp_path / name).parent == (tmp_path / name).resolve().parent == tmp_path.resolve()


@pytest.fixture
def topics_with_a_test(topics_csv, tmp_path):
    """A folder with a training and a test file, and one in which the labels of the test file are other ones."""
    head, *lines = topics_csv.read_text().splitlines()
    turned = {"sport": "money", "money": "space", "space": "sport"}
    corrupt = [f"{text},{turned[label]},{rest}" for text, label, rest in (line.split(",", 2) for line in lines)]
    folders = {}
    for name, test in (("true", lines[72:]), ("corrupt", corrupt[72:])):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "train.csv").write_text("\n".join([head, *lines[:72]]) + "\n")
        (folders[name] / "test.csv").write_text("\n".join([head, *test]) + "\n")
    return folders


def test_what_is_picked_does_not_depend_on_the_test_labels(study, tmp_path, topics_with_a_test):
    words = ["--vary", "adapter.r=4,2", "--tune", "training.learning_rate=3e-1,1e-4", "--seeds", 1]
    for name, folder in topics_with_a_test.items():
        code, _, err = study(f"data.name={folder}", *words, out=tmp_path / f"study-{name}")
        assert code == 0, err
    tunings = {name: rows(tmp_path / f"study-{name}" / "tuning.csv") for name in topics_with_a_test}
    assert tunings["true"] == tunings["corrupt"]
    results = {name: rows(tmp_path / f"study-{name}" / "results.csv") for name in topics_with_a_test}
    assert [row["final"] for row in results["true"]] != [row["final"] for row in results["corrupt"]], "the cells do see them"
    for arm in ("r-4", "r-2"):
        scores = {row["training.learning_rate"]: float(row["score"]) for row in tunings["true"] if row["arm"] == arm}
        assert len(set(scores.values())) > 1
        (picked,) = [row["training.learning_rate"] for row in tunings["true"] if row["arm"] == arm and row["picked"] == "yes"]
        assert picked == max(scores, key=scores.get)
        (row,) = [row for row in results["true"] if row["arm"] == arm]
        assert row["training.learning_rate"] == picked
        config = read_run(tmp_path / "study-true" / "cells" / arm / "seed-0").config
        assert (config["training"]["learning_rate"], config["data"]["evaluate_on"]) == (float(picked), "test")
        trial = read_run(tmp_path / "study-true" / "tune" / arm / f"learning_rate-{picked}")
        assert trial.config["data"]["evaluate_on"] == "validation"
        assert trial.summary["metrics"]["accuracy"] == scores[picked]


def test_a_candidate_that_fails_is_not_picked_and_an_arm_without_a_pick_fails(study, tmp_path):
    code, _, _ = study("--vary", "strategy.max_update_norm=1e4,1e-9", "--tune", "training.learning_rate=1e+30,0.1", "--seeds", 1)
    assert code == 1
    tuning = rows(tmp_path / "study" / "tuning.csv")
    assert [(row["status"], row["picked"]) for row in tuning] == [("failed", "no"), ("finished", "yes"), ("failed", "no"), ("failed", "no")]
    good, bad = rows(tmp_path / "study" / "results.csv")
    assert (good["status"], good["training.learning_rate"]) == ("finished", "0.1")
    assert (bad["status"], bad["reason"]) == ("failed", "no candidate of --tune finished")


def texts(examples):
    return set(examples.columns["text"])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("own_test_split", [False, True])
def test_validation_is_part_of_the_training_examples_and_the_test_part_is_gone(topics_csv, topics_with_a_test, seed, own_test_split):
    name = str(topics_with_a_test["true"] if own_test_split else topics_csv)
    section = {"name": name, "test_fraction": 0.25}
    usual, choosing = (
        corpus.load(Config.from_dict({"data": {**section, "evaluate_on": split}}).data, READ, seed) for split in ("test", "validation")
    )
    assert texts(choosing.train) | texts(choosing.test) == texts(usual.train)
    assert not texts(choosing.train) & texts(choosing.test)
    assert not (texts(choosing.train) | texts(choosing.test)) & texts(usual.test)
    assert len(choosing.test) == len(usual.train) / 4
    assert set(choosing.test.labels) == set(usual.train.labels)


def test_a_validation_part_of_nothing_is_refused(topics_with_a_test):
    section = {"name": str(topics_with_a_test["true"]), "test_fraction": 0.0, "evaluate_on": "validation"}
    with pytest.raises(UserError, match=r"data\.test_fraction: 0\.0 of 72 examples leaves nothing to test on; raise it: the validation"):
        corpus.load(Config.from_dict({"data": section}).data, READ, 0)


def test_json_says_what_became_of_the_study(study, tmp_path):
    code, out, _ = study("--vary", "strategy.max_update_norm=1e4,1e-9", "--seeds", 1, "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert events[-1] == {"event": "study", "out": str(tmp_path / "study"), "cells": 2, "failed": 1}
    assert sum(event["event"] == "started" for event in events) == 2
    assert any(event["event"] == "note" and "failed: too few" in event["text"] for event in events)


def private_cell(tmp_path, strategy, budget, seed, accuracy):
    privacy = None if budget is None else {"target_epsilon": budget}
    summary = {"primary_metric": "accuracy", "metrics": {"accuracy": accuracy}, "privacy": privacy and {"epsilon": budget - 0.01}}
    settings = {"strategy.name": strategy, "privacy" if budget is None else "privacy.target_epsilon": str(budget)}
    return Cell(f"{strategy}-{budget}", settings, seed, Run(tmp_path, summary, (), {"privacy": privacy}))


def test_what_privacy_costs_is_a_row_for_arms_that_differ_in_nothing_else(tmp_path):
    scores = {("fedavg", 8.0): (0.5, 0.7), ("fedavg", None): (0.8, 0.9), ("ffa_lora", 8.0): (0.6, 0.6), ("ffa_lora", 2.0): (0.1, 0.3)}
    cells = [private_cell(tmp_path, *arm, seed, value) for arm, values in scores.items() for seed, value in enumerate(values)]
    cells.append(Cell("ffa_lora-2.0", {"strategy.name": "ffa_lora", "privacy.target_epsilon": "2.0"}, 2, reason="it broke"))
    costs = study_epsilon.costs(Results("name", cells))
    assert {name: {budget: found.mean for budget, found in line.items()} for name, line in costs.items()} == {
        "fedavg": {8.0: pytest.approx(0.6), math.inf: pytest.approx(0.85)},
        "ffa_lora": {2.0: pytest.approx(0.2), 8.0: pytest.approx(0.6)},
    }
    head, lines = study_epsilon.table(costs)
    assert head == ["epsilon", "2", "8", "none"]
    assert [line[:2] for line in lines] == [["fedavg", "-"], ["ffa_lora", "0.2000 ± 1.2706"]]
    study_epsilon.draw(costs, "accuracy", tmp_path / "epsilon.png")
    assert (tmp_path / "epsilon.png").stat().st_size > 10_000


def test_arms_that_are_private_in_other_ways_share_no_cell(tmp_path):
    """Noise levels that were seeded are told apart by what they would cost; clipping norms are other lines, beside the same plain arm."""

    def cell(section, accuracy, epsilon):
        summary = {"primary_metric": "accuracy", "metrics": {"accuracy": accuracy}, "privacy": section and {"epsilon": None, **epsilon}}
        given = {"target_epsilon": None, "noise_multiplier": None, "insecure_seed": None, "max_grad_norm": 1.0, **(section or {})}
        settings = {"strategy.name": "fedavg", **{f"privacy.{key}": str(value) for key, value in (section or {}).items()}}
        return Cell("fedavg", settings, 0, Run(tmp_path, summary, (), {"privacy": section and given}))

    plain = cell(None, 0.9, {})
    seeded = [
        cell({"noise_multiplier": s, "insecure_seed": 1}, a, {"epsilon_if_noise_were_secret": e})
        for s, a, e in ((8, 0.3, 0.5), (4, 0.4, 1.5))
    ]
    line = study_epsilon.costs(Results("name", [plain, *seeded]))["fedavg"]
    assert {budget: found.mean for budget, found in line.items()} == {0.5: 0.3, 1.5: 0.4, math.inf: 0.9}
    norms = [cell({"target_epsilon": 3.0, "max_grad_norm": C}, accuracy, {}) for C, accuracy in ((0.1, 0.4), (10.0, 0.8))]
    lines = study_epsilon.costs(Results("name", [plain, *norms]))
    assert {name: {budget: found.mean for budget, found in line.items()} for name, line in lines.items()} == {
        "fedavg, privacy.max_grad_norm=0.1": {3.0: 0.4, math.inf: 0.9},
        "fedavg, privacy.max_grad_norm=10.0": {3.0: 0.8, math.inf: 0.9},
    }


def test_arms_of_one_budget_have_no_such_row(study, tmp_path):
    code, _, said = study("strategy.num_rounds=1", *TWO_ARMS)
    assert code == 0, said
    assert "What privacy costs" not in (tmp_path / "study" / "study.md").read_text()
    assert not (tmp_path / "study" / "epsilon.png").exists()
