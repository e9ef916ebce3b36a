"""A ready config is a promise: it loads, it runs, and its measured result stands beside it."""

import json
import pathlib

import pytest

from fedpeft import Config, simulate

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
SHORT = ["strategy.num_rounds=1", "training.max_steps=1", "data.max_examples=300", "partition.min_examples=1", "data.max_length=16"]
LOCAL = {"ag_news.yaml": "ag_news", "log_anomaly.yaml": "bgl_2k"}  # the folder of real data that stands in for what is not shipped


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_ready_config_runs_shortened(file, tmp_path, request):
    local = []
    if file.name in LOCAL:
        local = [f"data.name={request.getfixturevalue('real_data') / LOCAL[file.name]}"]
    run = simulate(Config.load(file, [*SHORT, *local]), tmp_path / "run")
    assert run.summary["rounds_completed"] == 1
    assert run.summary["rejected_updates"] == 0
    assert (run.adapter_dir / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_ready_config_has_its_measured_result_in_the_table(file):
    rows = [line for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith(f"| [{file.name}]({file.name}) |")]
    assert len(rows) == 1
    assert any(character.isdigit() for character in rows[0])


@pytest.mark.slow
def test_the_engines_agree_over_the_quickstart(tmp_path):
    """All of its ten rounds. AdamW divides small gradients by their own size, so that rounding shows in single parameters."""
    runs = {engine: simulate(Config.load(None, [f"training.engine={engine}"]), tmp_path / engine) for engine in ("one", "many")}
    for left, right in zip(*((run.folder / "rounds.jsonl").read_text().splitlines() for run in runs.values()), strict=True):
        left, right = json.loads(left)["metrics"], json.loads(right)["metrics"]
        assert left["loss"] == pytest.approx(right["loss"], abs=3e-4)
        assert left["accuracy"] == pytest.approx(right["accuracy"], abs=2.5 / 477)  # two of the examples
    squares = [
        sum(float((array**2).sum()) for array in found)
        for found in ([array - runs["many"].arrays[name] for name, array in runs["one"].arrays.items()], runs["one"].arrays.values())
    ]
    assert squares[0] ** 0.5 < 1e-2 * squares[1] ** 0.5
