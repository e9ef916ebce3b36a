"""A ready config is a promise: it loads, it runs, and its measured result stands beside it."""

import json
import pathlib

import pytest

from fedpeft import Config, simulate

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
SHORT = ["strategy.num_rounds=1", "training.max_steps=1", "data.max_examples=300", "partition.min_examples=1", "data.max_length=16"]
# The folders of real data that stand in for the Hub, and what is said differently for them, as the config's own first lines have it.
LOCAL = {
    "ag_news.yaml": ["data.name={data}/ag_news"],
    "log_anomaly.yaml": ["data.name={data}/bgl_2k"],
    "text_pairs.yaml": ["data.name={data}/qnli", "data.test=null"],
    "instruction_tuning.yaml": [
        *("model.name={data}/models/stories260k", "model.chat_template=plain", "data.name={data}/dolly15k"),
        *("data.columns.context=input", "data.columns.completion=output", "data.max_length=256", "model.max_new_tokens=4"),
    ],
    "images.yaml": ["data.name={data}/pacs_2k", "data.columns.domain=client_id", "model.name={vit}"],
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_ready_config_runs_shortened(file, tmp_path, request):
    local = []
    if file.name in LOCAL:
        places = {"data": request.getfixturevalue("real_data"), "vit": request.getfixturevalue("tiny_vit")}
        local = [override.format(**places) for override in LOCAL[file.name]]
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
