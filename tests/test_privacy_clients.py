"""Privacy of whole clients in whole runs: what is charged and said, what goes on record, restarts, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from hearing import noise_heard

from fedpeft import Config, UserError, simulate
from fedpeft.privacy.accounting import Release, epsilon
from fedpeft.privacy.ledger import Ledger


@pytest.fixture
def settings(tiny_settings):
    return {**tiny_settings, "partition": {"name": "iid", "clients": 3}, "privacy": {"unit": "client", "noise_multiplier": 2.0}}


def run(settings, out, resume=False, **own):
    config = Config.from_dict({**settings, **own})
    with noise_heard(config.privacy is not None and config.privacy.noise_multiplier != 0):
        result = simulate(config, out, resume)
    return result, [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_a_run_is_charged_round_by_round_and_says_what_it_protects(settings, tmp_path):
    result, lines = run(settings, tmp_path / "run")
    said = result.summary["privacy"]
    assert (said["unit"], said["sigma"], said["q"], said["rounds"], said["clients"], said["denominator"]) == ("client", 2.0, 1.0, 3, 3, 3.0)
    assert said["epsilon"] == pytest.approx(epsilon([Release(2.0, 1.0, 3)], said["delta"]))
    assert said["epsilon"] <= said["epsilon_rdp"]
    assert Ledger(tmp_path / "run" / "ledger" / "server.jsonl").history == (Release(2.0, 1.0, 1),) * 3
    assert [line["epsilon"] for line in lines[1:]] == pytest.approx([epsilon([Release(2.0, 1.0, n)], said["delta"]) for n in (1, 2, 3)])
    words = " ".join(said["assumptions"])
    assert "one whole client, added or removed" in words
    assert "the server is trusted" in words
    assert "no amplification" in words
    page = (tmp_path / "run" / "report.html").read_text()
    assert "one whole client, added or removed" in page


def test_records_hold_nothing_of_clients_without_noise(settings, tmp_path):
    _, lines = run(settings, tmp_path / "run")
    for line in lines[1:]:
        assert line["loss"] is None
        assert line["client_update_norms"] == {}
        assert line["examples"] == 0
        assert set(line["report"]) == {"clipping_norm"}
        assert line["metrics"]["accuracy"] >= 0


STRATEGIES = {
    "fedavg": {},
    "ffa_lora": {},
    "lora_fair": {},
    "ro_lora": {},
    "fed_svd": {},
    "fedprox": {},
    "fedadam": {"over": "ffa_lora"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_that_need_only_a_mean_run(strategy, settings, tmp_path):
    result, lines = run(settings, tmp_path / "run", strategy={"name": strategy, "num_rounds": 2, **STRATEGIES[strategy]})
    assert result.summary["rejected_updates"] == 0
    assert result.summary["privacy"]["rounds"] == 2
    assert all(line["update_norm"] > 0 for line in lines[1:])


def test_fed_sb_runs_from_a_start_that_is_drawn(settings, tmp_path):
    result, _ = run(
        settings,
        tmp_path / "run",
        adapter={"name": "lora_sb", "r": 4, "start": "orthonormal", "target_modules": ["query"]},
        strategy={"name": "fed_sb", "num_rounds": 2},
    )
    assert result.summary["rejected_updates"] == 0


def test_lora_fair_of_a_released_mean_is_fedavg(settings, tmp_path):
    privacy = {**settings["privacy"], "insecure_seed": 3}
    arrays = [
        run(settings, tmp_path / name, privacy=privacy, strategy={"name": name, "num_rounds": 2})[0].arrays
        for name in ("lora_fair", "fedavg")
    ]
    for name in arrays[0]:
        np.testing.assert_allclose(arrays[0][name], arrays[1][name], atol=1e-6)


@pytest.mark.parametrize("engine", ["one", "many"])
def test_without_noise_and_clipping_the_run_is_the_one_without_privacy_bit_for_bit(engine, settings, tmp_path):
    """Three clients of 24 examples weigh alike in both; what differs is the whole way through the curator."""
    training = {**settings["training"], "engine": engine}
    private, _ = run(
        settings, tmp_path / "a", privacy={"unit": "client", "noise_multiplier": 0.0, "clipping_norm": float("inf")}, training=training
    )
    plain, _ = run(settings, tmp_path / "b", privacy=None, training=training)
    assert all(np.array_equal(private.arrays[name], plain.arrays[name]) for name in plain.arrays)
    assert private.summary["metrics"] == plain.summary["metrics"]
    assert private.summary["privacy"]["epsilon"] is None
    assert "NO guarantee" in private.summary["privacy"]["noise"]
    json.loads((tmp_path / "a" / "summary.json").read_text(), parse_constant=lambda said: pytest.fail(f"{said} is no JSON"))


def test_when_a_run_ends_says_nothing_of_who_took_part(settings, tmp_path):
    """Three rounds without one accepted update end a run in which clients have nothing to hide."""
    strategy = {"num_rounds": 5, "max_update_norm": 1e-9}
    result, lines = run(settings, tmp_path / "run", strategy=strategy)
    assert [line["accepted"] for line in lines[1:]] == [0] * 5
    assert (result.summary["rounds_completed"], result.summary["privacy"]["rounds"]) == (5, 5)
    plain, _ = run(settings, tmp_path / "plain", strategy=strategy, privacy=None)
    assert plain.summary["rounds_completed"] == 3


def test_rounds_that_ask_nobody_release_noise_and_are_charged(settings, tmp_path):
    privacy = {**settings["privacy"], "amplification": True}
    result, lines = run(settings, tmp_path / "run", privacy=privacy, strategy={"num_rounds": 6, "fraction_train": 0.001})
    assert result.summary["rounds_completed"] == 6
    assert sum(line["asked"] == 0 for line in lines[1:]) >= 5
    assert all(line["update_norm"] > 0 for line in lines[1:])
    assert Ledger(tmp_path / "run" / "ledger" / "server.jsonl").history == (Release(2.0, 0.001, 1),) * 6


def test_the_norm_adapts_over_rounds_and_restarts(settings, tmp_path):
    own = {"privacy": {**settings["privacy"], "clipping_norm": 1e3, "target_quantile": 0.5, "insecure_seed": 1}}
    whole, lines = run(settings, tmp_path / "run", **own)
    norms = [line["report"]["clipping_norm"] for line in lines[1:]]
    shares = [line["report"]["below_clipping_norm"] for line in lines[1:]]
    assert norms[0] == 1e3
    assert norms[2] == pytest.approx(norms[1] * np.exp(-0.2 * (shares[1] - 0.5)))
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoint").glob("round-*"))[-1])
    again, lines = run(settings, tmp_path / "run", resume=True, **own)
    assert [line["report"]["clipping_norm"] for line in lines[1:]] == norms
    assert all(np.array_equal(whole.arrays[name], again.arrays[name]) for name in whole.arrays)


def test_a_round_that_is_played_again_is_charged_again(settings, tmp_path):
    before = run(settings, tmp_path / "run")[0].summary["privacy"]["epsilon"]
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoint").glob("round-*"))[-1])  # as if killed between release and checkpoint
    after = run(settings, tmp_path / "run", resume=True)[0].summary["privacy"]
    assert after["rounds"] == 4
    assert after["epsilon"] > before


@pytest.mark.parametrize("unit", ["client", "example"])
@pytest.mark.parametrize("loss", ["the last line", "the file"])
def test_a_ledger_that_lost_its_end_is_refused_on_resume(loss, unit, settings, tmp_path):
    privacy = {**settings["privacy"], "unit": unit}
    run(settings, tmp_path / "run", privacy=privacy)
    for path in (tmp_path / "run" / "ledger").iterdir():
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1])) if loss == "the last line" else path.unlink()
    with pytest.raises(UserError, match=r"--resume: the ledgers add up to epsilon .*, and round 3 had reached .*: they have lost lines"):
        simulate(Config.from_dict({**settings, "privacy": privacy}), tmp_path / "run", resume=True)


def test_a_target_is_kept_and_a_spent_budget_ends_the_run(settings, tmp_path):
    result, _ = run(settings, tmp_path / "target", privacy={"unit": "client", "target_epsilon": 3.0})
    assert 0.98 * 3.0 < result.summary["privacy"]["epsilon"] <= 3.0
    assert result.summary["stopped_because"] == "finished"
    two = 1.01 * epsilon([Release(2.0, 1.0, 2)], 1e-5)
    result, lines = run(settings, tmp_path / "spent", privacy={**settings["privacy"], "target_epsilon": two, "target_delta": 1e-5})
    assert result.summary["stopped_because"].startswith("privacy budget spent: another round would reach epsilon")
    assert len(lines) == 1 + 2
    assert (result.adapter_dir / "adapter_model.safetensors").is_file()


def test_seeded_noise_states_no_epsilon(settings, tmp_path):
    result, _ = run(settings, tmp_path / "run", privacy={**settings["privacy"], "insecure_seed": 1})
    assert result.summary["privacy"]["epsilon"] is None
    assert "NO guarantee" in result.summary["privacy"]["noise"]


CLIENT = {"unit": "client", "target_epsilon": 3.0}
REFUSED = {
    "no mean": ({"strategy": {"name": "median", "over": "ffa_lora"}}, "strategy.name"),
    "products of single clients": ({"strategy": {"name": "fedex_lora"}}, "strategy.name"),
    "memories of single clients": ({"strategy": {"name": "scaffold"}, "training": {"optimizer": "sgd"}}, "strategy.name"),
    "a server optimiser over no mean": ({"strategy": {"name": "fedavgm", "over": "flora_na"}}, "strategy.name"),
    "a count that decides": ({"strategy": {"min_train_nodes": 2}}, "strategy.min_train_nodes"),
    "a head from sums": ({"training": {"head_init": "class_statistics"}}, "training.head_init"),
    "a start from sums": ({"adapter": {"name": "fora"}}, "adapter.name"),
    "metrics of private examples": ({"data": {"validation_fraction": 0.1}}, "data.validation_fraction"),
    "a key of the other unit": ({"privacy": {**CLIENT, "max_grad_norm": 0.5}}, "privacy"),
    "keys of this unit for the other": ({"privacy": {"target_epsilon": 3.0, "amplification": True}}, "privacy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_noise_at_the_server_does_not_cover_is_refused_when_the_config_is_read(name):
    change, where = REFUSED[name]
    with pytest.raises(UserError) as caught:
        Config.from_dict({"privacy": CLIENT, **change, "training": {"head_init": "random", **change.get("training", {})}})
    assert [problem.where for problem in caught.value.problems] == [where]


def test_the_plan_is_one_for_all_clients(settings, tmp_path, capsys):
    import yaml

    from fedpeft.cli import main

    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**settings, "privacy": CLIENT}))
    assert main(["privacy", "plan", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    assert "all clients" in said
    assert "2.9" in said
    assert "times the clipping norm" in said
    assert main(["privacy", "plan", str(tmp_path / "c.yaml"), "privacy.target_delta=0.5"]) == 2
    assert "a whole client out of 3" in capsys.readouterr().err
