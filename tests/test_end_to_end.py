"""The command as a person types it: a run folder that PEFT reads, a kill that costs nothing, one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from fedpeft import Config, UserError, simulate
from fedpeft.arrays import digest
from fedpeft.cli import main
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate

FRESH_PROCESS = """
import sys, numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base, adapter, texts, labels, out = sys.argv[1:6]
texts = open(texts).read().splitlines()
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=int(labels)), adapter).eval()
with torch.no_grad():
    logits = [model(**tokenizer(text, truncation=True, max_length=16, return_tensors="pt")).logits[0].numpy() for text in texts]
np.save(out, np.stack(logits))
"""


def fedpeft(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "fedpeft", *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.fixture
def config_file(tiny_settings, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_settings))
    return file


def adapter_digest(run):
    return digest(load_file(run / "adapter" / "adapter_model.safetensors"))


def test_a_run_leaves_the_whole_folder_behind(config_file, tmp_path):
    out = tmp_path / "run"
    done = fedpeft("simulate", config_file, "--out", out)
    assert done.returncode == 0, done.stderr
    for name in ("config.yaml", "rounds.jsonl", "summary.json", "partition.png", "curves.png", "report.html", "checkpoint"):
        assert (out / name).exists(), name
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert summary["rounds_completed"] == 3
    assert summary["stopped_because"] == "finished"
    assert summary["metrics"] == lines[-1]["metrics"]
    assert summary["initial"] == lines[0]["metrics"]
    assert summary["bytes_up"] == sum(line["bytes_up"] for line in lines) > 0
    assert summary["best"]["accuracy"] == max(line["metrics"]["accuracy"] for line in lines[1:])
    assert all(line["examples"] == 72 for line in lines[1:])
    assert set(summary["seconds"]) == {"exchange", "combine", "evaluate", "total"}
    assert (out / "partition.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in done.stdout, "no terminal, no colours"
    assert sum("round" in line and "loss" in line for line in done.stdout.splitlines()) == 3
    assert "LOAD REPORT" not in done.stderr + done.stdout


def test_the_adapter_folder_gives_the_runs_logits_in_a_fresh_process(tiny_config, tiny_bert, tmp_path):
    run = simulate(tiny_config, tmp_path / "run")
    parts = assemble(tiny_config)
    parts.adapted.write(run.arrays)
    ours = evaluate.logits(parts.adapted, parts.test, 8)
    (tmp_path / "texts.txt").write_text("\n".join(parts.split.corpus.test.columns["text"]))
    arguments = [tiny_bert, run.adapter_dir, tmp_path / "texts.txt", "3", tmp_path / "logits.npy"]
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours).max() > 0.05, "logits that could be told apart from zero"
    assert run.summary["metrics"]["accuracy"] == (theirs.argmax(axis=1) == parts.test.labels).mean()


@pytest.mark.parametrize("engine", ["one", "many"])
def test_equal_seeds_give_bit_identical_adapters_and_other_seeds_do_not(engine, tiny_settings, tmp_path):
    settings = {**tiny_settings, "training": {**tiny_settings["training"], "engine": engine}}
    runs = [simulate(Config.from_dict({**settings, "seed": seed}), tmp_path / name) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    digests = [digest(run.arrays) for run in runs]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("victim_round", "engine"), [(0, "one"), (7, "many"), (23, "one")])
def test_a_run_killed_in_any_round_resumes_to_the_same_bits(tiny_settings, tmp_path, victim_round, engine):
    settings = {**tiny_settings, "strategy": {"num_rounds": 40, "fraction_train": 0.5}}
    settings["adapter"] = {**settings["adapter"], "lora_dropout": 0.1}
    settings["training"] = {**settings["training"], "head_init": "class_statistics", "learning_rate": 1e-4, "engine": engine}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    straight = simulate(Config.load(config), tmp_path / "straight")
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpeft", "simulate", config, "--out", out, "--json"], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "round" and event["round"] == victim_round:
            time.sleep(0.005 * victim_round)  # somewhere within the next rounds
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert not (out / "summary.json").exists()
    resumed = fedpeft("simulate", "--resume", "--out", out)
    assert resumed.returncode == 0, resumed.stderr
    assert adapter_digest(out) == adapter_digest(tmp_path / "straight")
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(41))
    assert [line["metrics"] for line in lines] == [
        record["metrics"] for record in map(json.loads, (tmp_path / "straight" / "rounds.jsonl").open())
    ]
    assert straight.summary["metrics"] == json.loads((out / "summary.json").read_text())["metrics"]


def test_a_finished_run_resumes_to_itself(config_file, tmp_path):
    out = tmp_path / "run"
    simulate(Config.load(config_file), out)
    before = adapter_digest(out)
    assert fedpeft("simulate", config_file, "--out", out, "--resume").returncode == 0
    assert adapter_digest(out) == before


def test_json_output_is_one_object_a_line(config_file, tmp_path):
    done = fedpeft("simulate", config_file, "--out", tmp_path / "run", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["started", *["round"] * 4, "finished"]


def test_an_interrupted_run_can_be_resumed(config_file, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fedpeft", "simulate", config_file, "strategy.num_rounds=500", "--out", tmp_path / "run", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background inherits "ignore"
    )
    for line in process.stdout:
        if json.loads(line)["event"] == "round":
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate()
    assert process.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said


MISTAKES = {
    "missing data file": (["data.name=gone.csv"], "there is no file gone.csv"),
    "missing folder": (["data.name=./gone/"], "there is no file gone"),
    "hub name without network": (["data.name=some-owner/some-data"], "the Hub gave no data set of that name"),
    "missing column": (["data.columns.text=body"], 'no column "body"; allowed: client, domain, label, text'),
    "missing client column": (["data.columns.client=owner"], 'no column "owner"'),
    "label not in the set": (["data.labels=[sport, money]"], "has the label 'space'; allowed: sport, money"),
    "more clients than examples": (["partition.clients=1000"], "partition.clients"),
    "minimum that cannot be met": (["partition.min_examples=30"], "partition.min_examples"),
    "wrong model path": (["model.name=./gone"], "there is no such folder"),
    "model folder without a model": (["model.name=."], "no config.json"),
    "hub model without network": (["model.name=some-owner/some-model"], "cannot be loaded"),
    "target modules that match nothing": (["adapter.target_modules=[q_proj]"], "target_modules among dense, key, query, value"),
    "misspelt strategy": (["strategy.name=fedavgg"], 'did you mean "fedavg"?'),
    "unknown key": (["training.max_step=3"], 'did you mean "max_steps"?'),
    "device that is not there": (["training.device=cuda:7"], "cannot be used"),
    "nothing to test on": (["data.test_fraction=0"], "leaves nothing to test on"),
    "resume without a run": (["--resume"], "holds no run"),
}


def complaints(capsys, *arguments):
    """What the command says of bad input, in this process."""
    assert main([str(argument) for argument in arguments]) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedpeft: ")]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(name, config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra, says = MISTAKES[name]
    lines = complaints(capsys, "simulate", config_file, *extra, "--out", tmp_path / "run")
    assert len(lines) == 1, lines
    assert says in lines[0]
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_mistakes_of_data_and_model_are_said_together(config_file, tmp_path, capsys):
    extra = ["data.name=gone.csv", "adapter.target_modules=[q_proj]", "training.device=cuda:7"]
    assert len(complaints(capsys, "simulate", config_file, *extra, "--out", tmp_path / "run")) == 3


def test_a_mistake_ends_the_process_without_a_traceback(config_file, tmp_path):
    done = fedpeft("simulate", config_file, "data.name=gone.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("fedpeft: data.name: there is no file gone.csv")
    assert "Traceback" not in done.stderr


def test_a_row_that_is_no_text_is_named(tmp_path, tiny_settings):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine", "label": "a"}\n{"text": 5, "label": "b"}\n')
    with pytest.raises(UserError, match="row 2 of the train rows holds 5 where a text should be"):
        assemble(Config.from_dict({**tiny_settings, "data": {"name": str(tmp_path / "rows.jsonl")}}))


def test_a_run_folder_is_never_overwritten(config_file, tmp_path):
    out = tmp_path / "run"
    simulate(Config.load(config_file), out)
    before = sorted((file, file.stat().st_mtime_ns) for file in out.rglob("*"))
    done = fedpeft("simulate", config_file, "--out", out)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert sorted((file, file.stat().st_mtime_ns) for file in out.rglob("*")) == before


def test_resume_with_another_config_names_the_key(config_file, tmp_path):
    simulate(Config.load(config_file), tmp_path / "run")
    done = fedpeft("simulate", config_file, "training.learning_rate=0.5", "--out", tmp_path / "run", "--resume")
    assert done.returncode == 2
    assert "training.learning_rate" in done.stderr


def test_partition_writes_a_table_and_a_picture(config_file, tmp_path):
    done = fedpeft("partition", config_file, "--out", tmp_path / "split")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "split" / "partition.png").read_bytes().startswith(b"\x89PNG")
    rows = (tmp_path / "split" / "partition.csv").read_text().splitlines()
    assert len(rows) == 5
    assert sum(int(row.split(",")[1]) for row in rows[1:]) == 72


def test_report_compares_runs(config_file, tmp_path):
    for name, rate in (("a", 0.01), ("b", 0.02)):
        simulate(Config.load(config_file, [f"name={name}", f"training.learning_rate={rate}"]), tmp_path / name)
    done = fedpeft("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "both" / "report.html").read_text()
    assert "training.learning_rate" in page


@pytest.mark.parametrize("kind", ["config", "strategies", "adapters", "partitioners", "sources", "kinds"])
def test_list_has_something_to_say(kind):
    done = fedpeft("list", kind)
    assert done.returncode == 0
    assert done.stdout.strip()


def test_doctor_looks_at_this_machine():
    assert "packaged model minilm at" in fedpeft("doctor").stdout
