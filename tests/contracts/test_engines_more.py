"""Engine `many` against the reference, for the adapters and local rules beside plain LoRA."""

from __future__ import annotations

import dataclasses

import pytest

from fedpeft.training import cohort, many, one, stacked_rules, stiefel

from .engines import ADAPTERS, CLOSE, TARGETS, build_with, farthest, jobs_with_rules, moved, no_dropout, said

OPTIMIZERS = {"adamw": {"learning_rate": 1e-2}, "sgd": {"optimizer": "sgd", "learning_rate": 0.05}}
RAGGED = {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}


def both(config, parts, jobs, caplog):
    many._say.cache_clear()
    left, right = (engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many))
    assert not said(caplog), "fell back: there is nothing to compare"
    return left, right


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_stacked_adapter_trains_as_one_by_one(adapter, optimizer, tiny_settings, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS[adapter], clients=3, **RAGGED, **OPTIMIZERS[optimizer])
    jobs = jobs_with_rules(parts)
    left, right = both(config, parts, jobs, caplog)
    assert moved(jobs, left) > 1e-4
    assert len({trained.steps for trained in left}) > 1, "clients of different numbers of steps"
    assert farthest(left, right) < CLOSE


@pytest.mark.parametrize("adapter", ["lora", "fora", "miss", "lora_sb"])
def test_one_or_many_more_clients(adapter, tiny_settings, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS[adapter], clients=32, max_steps=2)
    jobs = jobs_with_rules(parts)
    whole, few, alone = (many.train(parts.adapted, parts.task, config, some) for some in (jobs, [jobs[20], *jobs[:7]], [jobs[3]]))
    assert not said(caplog)
    assert farthest(one.train(parts.adapted, parts.task, config, jobs), whole) < CLOSE
    assert farthest([whole[20], *whole[:7], whole[3]], [*few, *alone]) < CLOSE / 10


def test_rules_that_are_left_out_are_missed(tiny_settings, caplog, monkeypatch):
    """A planted error of each kind."""
    config, parts = build_with(tiny_settings, ADAPTERS["fora"], clients=3, **RAGGED)
    jobs = jobs_with_rules(parts)
    left, _ = both(config, parts, jobs, caplog)
    move = stiefel.move
    errors = {
        "one second moment for all clients": lambda X, G, M, v, t, eta: move(X, G, M, v.mean(0, keepdim=True).expand_as(v).clone(), t, eta),
        "the rate of the other tensors": lambda X, G, M, v, t, eta: move(X, G, M, v, t, eta / 5.0),
        "not moved": lambda *given: None,
    }
    for name, wrong in errors.items():
        with monkeypatch.context() as patch:
            patch.setattr(stiefel, "move", wrong)
            assert farthest(left, many.train(parts.adapted, parts.task, config, jobs)) > 10 * CLOSE, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_penalties_on_the_last_ranks(optimizer, tiny_settings, caplog, monkeypatch):
    """HetLoRA's, of clients of different ranks and strengths."""
    config, parts = build_with(tiny_settings, {**ADAPTERS["lora"], "r": 8}, **RAGGED, **OPTIMIZERS[optimizer])
    jobs = []
    for job in jobs_with_rules(parts):
        r = (8, 3, 1, 5)[job.client]
        start = {n: a[:r] if n.endswith("lora_A.weight") else a[:, :r] if n.endswith("lora_B.weight") else a for n, a in job.start.items()}
        jobs.append(dataclasses.replace(job, start=start, tail=(0.5 * job.client, 0.5)))
    left, right = both(config, parts, jobs, caplog)
    assert farthest(left, right) < CLOSE
    bare = [dataclasses.replace(job, tail=(0.0, 0.5)) for job in jobs]
    assert farthest(left, one.train(parts.adapted, parts.task, config, bare)) > 100 * CLOSE
    monkeypatch.setattr(stacked_rules.StackedRules, "_shrink_tails", lambda *given: None)
    assert farthest(left, many.train(parts.adapted, parts.task, config, jobs)) > 100 * CLOSE


def test_the_form_that_multiplies_weights_falls_back(tiny_settings, caplog):
    many._say.cache_clear()
    config, parts = build_with(tiny_settings, {"name": "miss", "r": 4, "init_weights": "bat", **TARGETS}, max_steps=1)
    ended = many.train(parts.adapted, parts.task, config, jobs_with_rules(parts))
    assert all(trained.fell_back for trained in ended)
    assert "no plain LoRA or MiSS" in said(caplog)[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_gradient_of_a_client_is_anothers(optimizer, tiny_settings, monkeypatch, caplog):
    """A client whose gradients are a million times larger changes nothing for the others."""
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], clients=3, max_grad_norm=None, **OPTIMIZERS[optimizer])
    no_dropout(parts)
    jobs = jobs_with_rules(parts)
    quiet = many.train(parts.adapted, parts.task, config, jobs)
    backward = cohort.CohortTraining._backward

    def loud(training, plans, losses):
        backward(training, plans, losses)
        training.trained.gradient[[job.client for job in training.jobs].index(1)] *= 1e6

    monkeypatch.setattr(cohort.CohortTraining, "_backward", loud)
    noisy = many.train(parts.adapted, parts.task, config, jobs)
    assert farthest([quiet[0], quiet[2]], [noisy[0], noisy[2]]) == 0.0
    if optimizer == "sgd":
        assert farthest([quiet[1]], [noisy[1]]) > 1.0
