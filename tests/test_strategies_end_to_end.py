"""Every strategy through real messages, clients and training: what travels, what stays, what is refused."""

import json

import numpy as np
import pytest

from fedpeft import Config, simulate, wire
from fedpeft.records import Failure
from fedpeft.simulations.assemble import assemble

EXACT = {"ffa_lora", "ro_lora", "fed_svd", "flora", "fedex_lora"}


def run(settings, name, out, **own):
    config = Config.from_dict({**settings, "strategy": {"name": name, "num_rounds": 3, **own}})
    result = simulate(config, out)
    return result, [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name", ["fedavg", "ffa_lora", "lora_fair", "flora_na", "ro_lora", "fed_svd", "flora", "fedex_lora", "flex_lora", "fedsmooth_lora"]
)
def test_a_strategy_runs_and_says_its_error(name, tiny_settings, tmp_path):
    result, lines = run(tiny_settings, name, tmp_path / "run")
    assert result.summary["rejected_updates"] == 0
    assert all(line["update_norm"] > 0 for line in lines[1:])
    found = [line["report"]["aggregation_error"] for line in lines[2:]]
    assert max(found) < 1e-6 if name in EXACT else min(found) > 1e-6


def test_fair_is_nearer_to_the_ideal_than_fedavg(tiny_settings, tmp_path):
    errors = {}
    for name, own in (("fedavg", {}), ("lora_fair", {"regularisation": 0.0})):
        _, lines = run(tiny_settings, name, tmp_path / name, **own)
        errors[name] = lines[1]["report"]["aggregation_error"]
    assert errors["lora_fair"] < errors["fedavg"]


def test_ffa_never_moves_or_sends_A(tiny_settings, tmp_path):
    result, lines = run(tiny_settings, "ffa_lora", tmp_path / "run")
    drawn = assemble(Config.from_dict(tiny_settings)).adapted.read()
    _, plain = run(tiny_settings, "fedavg", tmp_path / "plain")
    head = sum(drawn[name].nbytes for name in drawn if "lora" not in name)
    factors = sum(drawn[name].nbytes for name in drawn if "lora" in name)
    for name in drawn:
        assert np.array_equal(result.arrays[name], drawn[name]) == ("lora_A" in name)
    for line, full in zip(lines[1:], plain[1:], strict=True):
        for way in ("bytes_up", "bytes_down"):
            saved = full[way] - line[way]
            assert factors / 2 * 4 <= saved < factors / 2 * 4 + 4 * 1000, "four clients, half of the factors, and their names"
    assert head > 0


def test_ro_lora_moves_one_factor_a_round(tiny_settings, tmp_path):
    moved = []
    before = None
    for rounds in (1, 2):
        config = Config.from_dict({**tiny_settings, "strategy": {"name": "ro_lora", "num_rounds": rounds}})
        result = simulate(config, tmp_path / str(rounds))
        before = before or assemble(config).adapted.read()
        moved.append(
            {kind: any(not np.array_equal(result.arrays[n], before[n]) for n in before if kind in n) for kind in ("lora_A", "lora_B")}
        )
        before = result.arrays
    assert moved == [{"lora_A": False, "lora_B": True}, {"lora_A": True, "lora_B": False}]


def test_a_client_with_another_A_is_left_out_with_its_reason(tiny_settings):
    config = Config.from_dict({**tiny_settings, "strategy": {"name": "ffa_lora"}})
    parts = assemble(config)
    other = assemble(Config.from_dict({**tiny_settings, "seed": 1, "strategy": {"name": "ffa_lora"}}))
    from fedpeft.server.asking import assign
    from fedpeft.server.federation import Outcome
    from fedpeft.simulations import run as simulation

    federation = simulation._federation(config, parts, dict)
    (asked,) = assign(federation, wire.TRAIN, [0], Outcome(federation.arrays, {}), 1).assignments
    assert not isinstance(parts.worker.answer([asked])[0], Failure)
    (answer,) = other.worker.answer([asked])
    assert isinstance(answer, Failure)
    assert answer.reason.startswith("other seed, library or history: holds other frozen tensors")


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fedsmooth_lora"])
def test_a_client_with_a_stale_backbone_is_left_out_with_its_reason(name, tiny_settings, tmp_path):
    """The server believes that client 0 holds the merges of earlier rounds; this one was started anew and holds none."""
    from fedpeft.server.asking import assign
    from fedpeft.server.checkpoint import latest
    from fedpeft.server.federation import Outcome
    from fedpeft.simulations import run as simulation

    config = Config.from_dict({**tiny_settings, "strategy": {"name": name, "num_rounds": 3}})
    simulate(config, tmp_path / "run")
    kept = latest(tmp_path / "run" / "checkpoint")
    parts = assemble(config)
    federation = simulation._federation(config, parts, dict)
    for seen, refused in ((2, True), (-1, False)):
        (asked,) = assign(federation, wire.TRAIN, [0], Outcome(kept.arrays, {}, seen={0: seen}), 3).assignments
        (answer,) = parts.worker.answer([asked])
        assert isinstance(answer, Failure) == refused, answer
        if refused:
            assert answer.reason.startswith("other seed, library or history")


def test_the_A_of_fed_svd_comes_from_the_server_with_orthonormal_rows(tiny_settings, tmp_path):
    result, _ = run(tiny_settings, "fed_svd", tmp_path / "run")
    for name, array in result.arrays.items():
        if "lora_A" in name:
            np.testing.assert_allclose(array @ array.T, np.eye(len(array)), atol=1e-5)


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fedsmooth_lora"])
def test_what_was_merged_is_in_the_adapter_that_peft_reloads(name, tiny_settings, tiny_bert, tmp_path):
    """Partial participation, so that clients come back after rounds they missed; the exported LoRA is of a higher rank."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from fedpeft.training import evaluate

    settings = {**tiny_settings, "strategy": {"name": name, "num_rounds": 4, "fraction_train": 0.5}}
    result = simulate(Config.from_dict(settings), tmp_path / "run")
    assert result.summary["rejected_updates"] == 0
    parts = assemble(Config.from_dict(settings))
    parts.adapted.write(result.arrays)
    ours = evaluate.logits(parts.adapted, parts.test, 8)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model = PeftModel.from_pretrained(base, result.adapter_dir).eval()
    assert model.peft_config["default"].r > 4
    inputs, _ = parts.test.batch(np.arange(len(parts.test)), parts.adapted.base.tokenizer, "cpu")
    with torch.no_grad():
        theirs = model(**inputs).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    parts.adapted.write({n: a for n, a in result.arrays.items() if not n.startswith("merged.")})
    assert np.abs(evaluate.logits(parts.adapted, parts.test, 8) - ours).max() > 1e-4, "the backbone matters"


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fedsmooth_lora"])
def test_merges_travel_once_to_each_client(name, tiny_settings, tmp_path):
    settings = {**tiny_settings, "partition": {"name": "iid", "clients": 4}}
    _, lines = run(settings, name, tmp_path / "run", num_rounds=5)
    down = [line["bytes_down"] for line in lines[2:]]
    assert max(down) - min(down) < 0.05 * max(down), "not growing with the rounds"


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fedsmooth_lora"])
def test_a_killed_run_that_merges_resumes_to_the_same_bits(name, tiny_settings, tmp_path):
    import shutil

    from fedpeft.arrays import digest

    settings = {**tiny_settings, "strategy": {"name": name, "num_rounds": 4, "fraction_train": 0.5}}
    config = Config.from_dict(settings)
    whole = simulate(config, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoint").glob("round-*"))[-1]
    shutil.rmtree(newest)  # as if killed in the last round
    again = simulate(config, tmp_path / "run", resume=True)
    assert digest(again.arrays) == digest(whole.arrays)
