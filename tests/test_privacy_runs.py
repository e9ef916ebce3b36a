"""Differential privacy in whole runs: what is charged, what is stated, when a run stops, and that the noise is there."""

import json

import numpy as np
import pytest
import torch
from hearing import noise_heard

from fedpeft import Config, UserError, simulate
from fedpeft.privacy import statement
from fedpeft.privacy.accounting import Release, epsilon
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.noise import Insecure, Secure
from fedpeft.simulations.assemble import assemble
from fedpeft.training import many, one, private
from fedpeft.training.job import Job


@pytest.fixture
def settings(tiny_settings):
    return {**tiny_settings, "partition": {"name": "iid", "clients": 3}, "privacy": {"noise_multiplier": 2.0}}


def run(settings, out, **own):
    config = Config.from_dict({**settings, **own})
    with noise_heard(config.privacy is not None and config.privacy.noise_multiplier != 0):
        result = simulate(config, out)
    return result, [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_a_private_run_is_charged_over_all_its_rounds_and_says_so(settings, tmp_path):
    result, lines = run(settings, tmp_path / "run")
    said = result.summary["privacy"]
    plan = said["per_client"]["0"]
    assert (plan["sigma"], plan["steps"], plan["examples"]) == (2.0, 3 * 2, 24)
    assert plan["q"] == pytest.approx(4 / 24)
    assert said["epsilon"] == pytest.approx(epsilon([Release(2.0, 4 / 24, 6)], plan["delta"]))
    assert [line["epsilon"] for line in lines[1:]] == sorted(line["epsilon"] for line in lines[1:])
    assert lines[3]["epsilon"] == pytest.approx(said["epsilon"])
    assert lines[1]["epsilon"] < 0.9 * said["epsilon"], "not one round's for the whole run"
    assert all(line["loss"] is None for line in lines[1:]), "the training loss is a function of the data without noise"
    assert len(Ledger(tmp_path / "run" / "ledger" / "client-0.jsonl").history) == 3
    assert said["assumptions"]
    assert said["not_covered"]


def test_a_target_is_kept_by_the_noise_that_is_solved_for_it(settings, tmp_path):
    result, _ = run(settings, tmp_path / "run", privacy={"target_epsilon": 3.0})
    assert 0.98 * 3.0 < result.summary["privacy"]["epsilon"] <= 3.0
    assert result.summary["stopped_because"] == "finished"


def test_a_run_stops_when_nobody_can_afford_another_round_and_keeps_its_model(settings, tmp_path):
    one_round = epsilon([Release(2.0, 4 / 24, 2)], 1e-5)
    result, lines = run(
        settings, tmp_path / "run", privacy={"noise_multiplier": 2.0, "target_epsilon": 1.05 * one_round, "target_delta": 1e-5}
    )
    assert result.summary["stopped_because"].startswith("privacy budget spent")
    assert result.summary["privacy"]["epsilon"] <= 1.05 * one_round
    assert [line["accepted"] for line in lines[1:]] == [3, 0]
    assert (result.adapter_dir / "adapter_model.safetensors").is_file()


def test_a_round_that_is_played_again_is_charged_again(settings, tmp_path):
    import shutil

    config = Config.from_dict(settings)
    whole = simulate(config, tmp_path / "run").summary["privacy"]["epsilon"]
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoint").glob("round-*"))[-1])  # as if killed after releasing, before the checkpoint
    again = simulate(config, tmp_path / "run", resume=True).summary["privacy"]["epsilon"]
    assert again > whole
    assert len(Ledger(tmp_path / "run" / "ledger" / "client-0.jsonl").history) == 4


def test_seeded_noise_states_no_epsilon(settings, tmp_path):
    result, _ = run(settings, tmp_path / "run", privacy={"noise_multiplier": 2.0, "insecure_seed": 1})
    assert result.summary["privacy"]["epsilon"] is None
    assert "NO guarantee" in result.summary["privacy"]["noise"]
    other, _ = run(settings, tmp_path / "other", privacy={"noise_multiplier": 2.0, "insecure_seed": 1})
    secret, _ = run(settings, tmp_path / "secret")
    assert all(np.array_equal(result.arrays[name], other.arrays[name]) for name in result.arrays)
    assert any(not np.array_equal(result.arrays[name], secret.arrays[name]) for name in result.arrays)


def one_step(settings, mechanism, **training):
    """How far one step of plain descent at rate 1 goes, tensor by tensor, and the start."""
    whole = {**settings["training"], "optimizer": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": None, **training}
    config = Config.from_dict({**settings, "training": whole})
    parts = assemble(config)
    for module in parts.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    generator = np.random.default_rng(0)
    start = {name: array + 0.3 * generator.normal(size=array.shape).astype(np.float32) for name, array in parts.adapted.read().items()}
    job = Job(0, 1, start, parts.adapted.trained, parts.worker.nodes[0].train, private=mechanism)
    (trained,) = one.train(parts.adapted, parts.task, config, [job])
    return {name: trained.arrays[name] - start[name] for name in trained.arrays}, config, parts, start


def test_the_noise_of_a_step_has_the_size_that_is_accounted(settings):
    """sigma C / b on every trained number. C is small, so that the data moves next to nothing."""
    from scipy.stats import kstest

    mechanism = Mechanism(sigma=100.0, C=0.01, q=0.2, batch=5.0, noise=Secure())
    moved, *_ = one_step(settings, mechanism)
    drawn = np.concatenate([array.ravel() for array in moved.values()]) * 5.0 / (100.0 * 0.01)
    assert len(drawn) > 1000
    assert kstest(drawn, "norm").pvalue > 1e-4


def test_without_noise_and_clipping_the_step_is_the_plain_one(settings):
    """q = 1: the batch is everything the client has, as for a plain step of that batch size."""
    n = 24
    mechanism = Mechanism(sigma=0.0, C=1e9, q=1.0, batch=float(n), noise=Secure())
    moved, *_ = one_step(settings, mechanism)
    plain, *_ = one_step(settings, None, per_device_train_batch_size=n)
    for name in plain:
        assert np.abs(plain[name]).max() > 1e-5
        np.testing.assert_allclose(moved[name], plain[name], atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_without_noise_and_clipping_is_the_plain_run_over_the_same_batches_bit_for_bit(dropout, settings, tmp_path, monkeypatch):
    """Privacy of examples is sampling, clipping and noise. With sigma 0 and C infinite the last two are the identity; the
    first is given to the run without privacy: the same Poisson batches, some of them empty, over the same expected batch."""
    training = {**settings["training"], "max_grad_norm": None, "max_steps": 6, "per_device_train_batch_size": 2}
    both = {"training": training, "adapter": {**settings["adapter"], "lora_dropout": dropout}}
    nothing = {"noise_multiplier": 0.0, "max_grad_norm": float("inf"), "insecure_seed": 4}
    made, lines = run(settings, tmp_path / "private", privacy=nothing, **both)
    assert made.summary["privacy"]["epsilon"] is None
    assert "NO guarantee" in made.summary["privacy"]["noise"]
    assert [line["accepted"] for line in lines[1:]] == [3, 3, 3]

    sizes, into_gradients = [], one._into_gradients

    def the_same_batches(config, job):
        noise = Insecure(4, job.round, job.client)
        drawn = [np.flatnonzero(noise.uniform(len(job.data)) < 2 / len(job.data)) for _ in range(6)]
        sizes.extend(map(len, drawn))
        return [np.split(rows, range(2, len(rows), 2)) if len(rows) else [] for rows in drawn]

    monkeypatch.setattr(one, "batches", the_same_batches)
    monkeypatch.setattr(one, "_into_gradients", lambda adapted, task, job, parts, records: into_gradients(adapted, task, job, parts, 2.0))
    plain, _ = run(settings, tmp_path / "plain", privacy=None, **both)
    assert 0 in sizes
    assert max(sizes) > 2
    assert all(np.array_equal(made.arrays[name], plain.arrays[name]) for name in plain.arrays)
    assert made.summary["metrics"] == plain.summary["metrics"]


def test_the_slow_path_gives_the_same_rows(settings, monkeypatch):
    _, _, parts, start = one_step(settings, None)
    names = dict(zip(parts.adapted.trained, parts.adapted.train_only(parts.adapted.trained), strict=True))
    job = Job(0, 1, start, parts.adapted.trained, parts.worker.nodes[0].train)
    fast = private.rows(parts.adapted, parts.task, job, np.arange(5), names)
    monkeypatch.setattr(private, "uncovered", lambda model, names: ["all of them"])
    slow = private.rows(parts.adapted, parts.task, job, np.arange(5), names)
    for name in names:
        largest = float(slow[name].abs().max())
        assert largest > 0
        np.testing.assert_allclose(fast[name].numpy(), slow[name].numpy(), atol=1e-4 * largest)


def test_an_empty_batch_releases_noise_and_counts(settings):
    mechanism = Mechanism(sigma=1.0, C=1.0, q=0.0, batch=5.0, noise=Secure())
    moved, *_ = one_step(settings, mechanism)
    assert all(array.any() for array in moved.values())


@pytest.mark.parametrize("strategy", ["ffa_lora", "lora_fair", "fed_svd", "ro_lora", "flora", "scaffold", "fedprox"])
def test_strategies_run_under_privacy(strategy, settings, tmp_path):
    training = {**settings["training"], "optimizer": "sgd"}
    result, _ = run(settings, tmp_path / "run", strategy={"name": strategy, "num_rounds": 2}, training=training)
    assert result.summary["rejected_updates"] == 0
    assert result.summary["privacy"]["epsilon"] > 0


OTHER_ADAPTERS = {
    "fora": ({"name": "fora", "r": 2, "layers": 1, "target_modules": ["query"]}, "fedavg"),
    "lora_sb": ({"name": "lora_sb", "r": 4, "start": "orthonormal", "target_modules": ["query"]}, "fed_sb"),
    "lora_fa": ({"name": "lora_fa", "r": 2, "target_modules": ["query"]}, "fedavg"),
}


@pytest.mark.parametrize("name", OTHER_ADAPTERS)
def test_adapters_with_rules_of_their_own_run_under_privacy(name, settings, tmp_path):
    """Orthonormal factors stay so (Cayley-Adam on a noisy gradient), and cores train; a start from gradients is refused below."""
    adapter, strategy = OTHER_ADAPTERS[name]
    result, _ = run(settings, tmp_path / "run", adapter=adapter, strategy={"name": strategy, "num_rounds": 2})
    assert result.summary["rejected_updates"] == 0
    assert result.summary["privacy"]["epsilon"] > 0
    for factor in (array for key, array in result.arrays.items() if name == "fora" and key.endswith("lora_B.weight")):
        np.testing.assert_allclose(factor.T @ factor, np.eye(2), atol=1e-5)


REFUSED = {
    "scores in the start": ({"adapter": {"name": "fora"}}, "adapter.name"),
    "a head from sums of features": ({"training": {"head_init": "class_statistics"}}, "training.head_init"),
    "gradients in the upload": ({"strategy": {"name": "fedsmooth_lora"}}, "strategy.name"),
    "gradients in the start": ({"adapter": {"name": "lora_sb"}, "strategy": {"name": "fed_sb"}}, "adapter.name"),
    "metrics of private examples": ({"data": {"validation_fraction": 0.1}}, "data.validation_fraction"),
    "no noise and no budget": ({"privacy": {}}, "privacy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_noise_does_not_cover_is_refused_when_the_config_is_read(name):
    change, where = REFUSED[name]
    whole = {"privacy": {"target_epsilon": 3.0}, **{"training": {"head_init": "random"}}, **change}
    with pytest.raises(UserError) as caught:
        Config.from_dict(whole)
    assert [problem.where for problem in caught.value.problems] == [where]


def test_a_delta_that_allows_a_whole_record_is_refused(settings):
    with pytest.raises(UserError, match=r"privacy\.target_delta: 0\.05 allows the disclosure of a whole record .* below 0\.042"):
        assemble(Config.from_dict({**settings, "privacy": {"noise_multiplier": 1.0, "target_delta": 0.05}}))


def test_the_plan_is_printed_before_anything_is_trained(settings, tmp_path, capsys):
    import yaml

    from fedpeft.cli import main

    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**settings, "privacy": {"target_epsilon": 3.0}}))
    assert main(["privacy", "plan", str(tmp_path / "c.yaml")]) == 0
    said = capsys.readouterr().out
    assert "sigma" in said
    assert said.count("2.9") >= 3
    assert main(["privacy", "plan", str(tmp_path / "c.yaml"), "privacy=null"]) == 2


def stated_by_a_server(settings, lines):
    """What a real server says: it has no ledgers, only what clients have told it."""
    config = Config.from_dict(settings)
    return statement.reported(config.privacy, [line["epsilon"] for line in lines if line["epsilon"] is not None])


def test_a_server_without_ledgers_counts_updates_that_it_rejected(settings, tmp_path):
    """Whoever reads along has seen them."""
    strategy = {"num_rounds": 3, "max_update_norm": 1e-9}
    result, lines = run(settings, tmp_path / "run", strategy=strategy)
    assert [line["accepted"] for line in lines[1:]] == [0, 0, 0]
    assert stated_by_a_server(settings, lines)["epsilon"] == pytest.approx(result.summary["privacy"]["epsilon"])


def test_a_server_counts_a_client_that_was_charged_and_broke(settings, tmp_path, monkeypatch):
    def breaks(*arguments):
        raise RuntimeError("secret words of a text")

    monkeypatch.setattr(private, "into_gradients", breaks)
    result, lines = run_quietly(settings, tmp_path / "run")
    assert stated_by_a_server(settings, lines)["epsilon"] == pytest.approx(result.summary["privacy"]["epsilon"])
    assert lines[1]["rejected_clients"]["0"] == "training broke: RuntimeError"


def run_quietly(settings, out):
    result = simulate(Config.from_dict(settings), out)
    return result, [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("privacy", "noise"),
    [({"noise_multiplier": 0.0}, "none: NO guarantee"), ({"noise_multiplier": 2.0, "insecure_seed": 3}, "seeded with 3: NO guarantee")],
)
def test_a_server_states_no_epsilon_where_there_is_none(privacy, noise, settings, tmp_path):
    _, lines = run(settings, tmp_path / "run", privacy=privacy)
    said = stated_by_a_server({**settings, "privacy": privacy}, lines)
    assert (said["epsilon"], said["noise"]) == (None, noise)
    assert (said["epsilon_if_noise_were_secret"] is None) == (privacy["noise_multiplier"] == 0)


def test_shares_of_the_time_say_nothing_of_batches(settings):
    """Clients of a cohort divide its time by their steps: how many records each drew is secret."""
    config = Config.from_dict({**settings, "training": {**settings["training"], "engine": "many"}})
    parts = assemble(config)
    jobs = [
        Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train, private=parts.worker.guards[client].begin(1))
        for client, node in parts.worker.nodes.items()
    ]
    times = [trained.seconds for trained in many.train(parts.adapted, parts.task, config, jobs)]
    assert times[0] > 0 and times == pytest.approx([times[0]] * 3)


@pytest.mark.parametrize(
    "privacy",
    [{"noise_multiplier": 2.0, "max_grad_norm": float("inf")}, {"unit": "client", "target_epsilon": 3, "clipping_norm": float("inf")}],
)
def test_noise_for_what_is_not_clipped_is_refused(privacy, settings):
    with pytest.raises(UserError, match="infinite: no noise hides what is not clipped"):
        Config.from_dict({**settings, "privacy": privacy})


def test_who_has_spent_its_budget_is_not_forgotten_by_a_restart(settings, tmp_path, monkeypatch):
    """Who is asked depends on it: the run is the same, however often it was interrupted."""
    from fedpeft.server import rounds

    own = {
        "partition": {"name": "quantity", "clients": 6, "alpha": 1.0, "min_examples": 6},
        "strategy": {"name": "ffa_lora", "num_rounds": 10, "fraction_train": 0.5},
        "privacy": {"noise_multiplier": 1.5, "target_epsilon": 2.2, "target_delta": 1e-5, "insecure_seed": 1},
    }
    whole, lines = run(settings, tmp_path / "whole", **own)
    first = next(line["round"] for line in lines if any("spent" in said for said in line["rejected_clients"].values()))
    finish = rounds._finish_round

    def stops(*arguments):
        finish(*arguments)
        if arguments[2].round == first:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rounds, "_finish_round", stops)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "again", **own)
    resumed = simulate(Config.from_dict({**settings, **own}), tmp_path / "again", resume=True)
    again = [json.loads(line) for line in (tmp_path / "again" / "rounds.jsonl").read_text().splitlines()]
    assert [(line["asked"], line["accepted"]) for line in again] == [(line["asked"], line["accepted"]) for line in lines]
    assert all(np.array_equal(whole.arrays[name], resumed.arrays[name]) for name in whole.arrays)
