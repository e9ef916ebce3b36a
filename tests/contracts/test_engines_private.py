"""Engine `many` against the reference under differential privacy: clipping, noise and batches are each client's own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fedpeft import Config, simulate
from fedpeft.privacy import mechanism as mechanism_file
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.mechanism import Mechanism, clipping, released
from fedpeft.privacy.noise import Insecure, Secure
from fedpeft.training import many, one, stacked_private

from .engines import ADAPTERS, CLOSE, build_with, farthest, jobs_with_rules, moved, no_dropout, said, settings_with

STEPS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-2, "optimizer": "sgd", "weight_decay": 0.0}
EVERY_Q = (0.3, 0.05, 0.9, 0.0)  # batches of less and more than one part, and of nothing


def private(jobs, sigma=0.5, noise=Insecure):
    """The jobs, each with a mechanism of its own, from its first draw on."""
    return [
        dataclasses.replace(
            job,
            private=Mechanism(
                sigma=sigma * (1 + job.client % 2),
                C=0.5 + 0.1 * (job.client % 3),
                q=EVERY_Q[job.client % 4],
                batch=max(1.0, EVERY_Q[job.client % 4] * len(job.data)),
                noise=noise(7, 2, job.client) if noise is Insecure else noise(),
            ),
        )
        for job in jobs
    ]


def both(config, parts, caplog, jobs=None):
    many._say.cache_clear()
    jobs = jobs or jobs_with_rules(parts)
    left, right = (engine.train(parts.adapted, parts.task, config, private(jobs)) for engine in (one, many))
    assert not said(caplog), "fell back: there is nothing to compare"
    assert all(trained.loss is None for trained in [*left, *right])
    return left, right


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("adapter", ["lora", "lora_fa", "fora", "miss", "lora_sb"])
def test_private_training_is_that_of_one_by_one(adapter, dropout, tiny_settings, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS[adapter], **STEPS)
    if not dropout:
        no_dropout(parts)
    jobs = jobs_with_rules(parts)
    left, right = both(config, parts, caplog, jobs)
    assert moved(jobs, left) > 1e-5
    assert farthest(left, right) < CLOSE


@pytest.mark.parametrize("clients", [1, 3, 8, 32])
def test_private_cohorts_of_every_size(clients, tiny_settings, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], clients=clients, **{**STEPS, "max_steps": 2, "optimizer": "adamw"})
    assert farthest(*both(config, parts, caplog)) < CLOSE


def test_private_clients_of_different_ranks(tiny_settings, caplog):
    config, parts = build_with(tiny_settings, {**ADAPTERS["lora"], "r": 8}, **STEPS)
    jobs = []
    for job in jobs_with_rules(parts):
        r = (8, 3, 1, 5)[job.client]
        start = {n: a[:r] if n.endswith("lora_A.weight") else a[:, :r] if n.endswith("lora_B.weight") else a for n, a in job.start.items()}
        jobs.append(dataclasses.replace(job, start=start))
    assert farthest(*both(config, parts, caplog, jobs)) < CLOSE


def test_ranks_that_a_client_does_not_have_get_no_noise(tiny_settings):
    config, parts = build_with(tiny_settings, {**ADAPTERS["lora"], "r": 8}, **STEPS)
    (job,) = jobs_with_rules(parts)[:1]
    start = {n: a[:2] if n.endswith("lora_A.weight") else a[:, :2] if n.endswith("lora_B.weight") else a for n, a in job.start.items()}
    one.train(parts.adapted, parts.task, config, private([dataclasses.replace(job, start=start)]))
    for pair in parts.adapted.layout().pairs:
        assert not parts.adapted.parameters[pair.A][2:].any()
        assert not parts.adapted.parameters[pair.B][:, 2:].any()


def test_short_passes_of_few_rows(tiny_settings, caplog, monkeypatch):
    monkeypatch.setattr("fedpeft.training.memory.rows_at_once", lambda *given: 3)
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], clients=8, **STEPS)
    assert farthest(*both(config, parts, caplog)) < CLOSE


def test_the_noise_is_that_of_one_to_the_bit_and_no_two_clients_have_the_same(tiny_settings, monkeypatch):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], clients=4, **STEPS)
    drawn = {}
    gaussian = mechanism_file.gaussian

    def heard(source, count):
        found = gaussian(source, count)
        drawn.setdefault(id(source), []).append(found)
        return found

    monkeypatch.setattr(mechanism_file, "gaussian", heard)
    jobs, streams = jobs_with_rules(parts), {}
    for engine in (one, many):
        seated = private(jobs)
        engine.train(parts.adapted, parts.task, config, seated)
        streams[engine] = [np.concatenate(drawn.pop(id(job.private.noise))) for job in seated]
    assert all(np.array_equal(left, right) for left, right in zip(streams[one], streams[many], strict=True))
    assert len(streams[one][0]) == 4 * sum(jobs[0].start[name].size for name in jobs[0].names), "every number, in every step"
    assert len({stream.tobytes() for stream in streams[many]}) == 4


def test_a_batch_of_nobody_releases_noise(tiny_settings, caplog):
    """Of all clients at once: there is no pass to make."""
    config, parts = build_with(
        tiny_settings, ADAPTERS["lora"], **{**STEPS, "max_steps": 1, "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    )
    nobody = [dataclasses.replace(job, private=dataclasses.replace(job.private, q=0.0)) for job in private(jobs_with_rules(parts), 3.0)]
    ended = many.train(parts.adapted, parts.task, config, nobody)
    assert not said(caplog)
    for job, trained in zip(nobody, ended, strict=True):
        far = np.concatenate([(trained.arrays[name] - job.start[name]).ravel() for name in job.names])
        mechanism = job.private
        assert far.std() == pytest.approx(mechanism.sigma * mechanism.C / mechanism.batch, rel=0.1)


def test_a_record_that_is_not_finite_counts_for_nothing(tiny_settings, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], **STEPS)
    no_dropout(parts)
    jobs = jobs_with_rules(parts)

    class Task:
        outputs = parts.task.outputs

        def losses(self, model, inputs, labels):
            return parts.task.losses(model, inputs, labels) * torch.where(labels == 1, torch.inf, 1.0)

    left, right = (engine.train(parts.adapted, Task(), config, private(jobs)) for engine in (one, many))
    assert all(np.isfinite(array).all() for trained in right for array in trained.arrays.values())
    assert farthest(left, right) < CLOSE


def together(rows, C):
    """Clipping over the cohort: one norm for all records of a pass."""
    _, finite = clipping(rows, C)
    norm = sum(row.double().square().sum() for row in finite.values()).sqrt()
    return (C / norm).clamp(max=1.0), finite


def shared(self):
    first = self.mechanisms[0].noise
    self.mechanisms = [dataclasses.replace(mechanism, noise=first) for mechanism in self.mechanisms]


def mixed(self, change):
    self.mechanisms = [
        dataclasses.replace(mechanism, **change(mechanism, self.mechanisms[place - 1])) for place, mechanism in enumerate(self.mechanisms)
    ]


ERRORS = {
    "none": None,
    "clipped over the cohort": lambda patch: patch.setattr(stacked_private, "clipping", together),
    "not clipped": lambda patch: patch.setattr(stacked_private, "clipping", lambda rows, C: clipping(rows, 1e9)),
    "noise shared between clients": lambda patch: after_init(patch, shared),
    "another client's denominator": lambda patch: after_init(patch, lambda self: mixed(self, lambda own, other: {"batch": other.batch})),
    "another client's noise multiplier": lambda patch: after_init(
        patch, lambda self: mixed(self, lambda own, other: {"sigma": other.sigma})
    ),
    "another client's clipping norm": lambda patch: after_init(patch, lambda self: setattr(self, "_C", self._C.roll(1))),
    "noise left out of an empty batch": lambda patch: patch.setattr(
        stacked_private, "released", lambda m, s: released(m, s) if any(v.any() for v in s.values()) else s
    ),
}


def after_init(patch, then):
    made = stacked_private.StackedPrivacy.__init__

    def init(self, *given):
        made(self, *given)
        then(self)

    patch.setattr(stacked_private.StackedPrivacy, "__init__", init)


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_seen(error, tiny_settings, monkeypatch, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], **STEPS)
    no_dropout(parts)
    jobs = jobs_with_rules(parts)
    left = one.train(parts.adapted, parts.task, config, private(jobs))
    if ERRORS[error]:
        ERRORS[error](monkeypatch)
    off = farthest(left, many.train(parts.adapted, parts.task, config, private(jobs)))
    assert not said(caplog)
    assert off < CLOSE if error == "none" else off > 10 * CLOSE


def test_secure_noise_is_drawn_for_every_client(tiny_settings):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], **{**STEPS, "max_steps": 1, "learning_rate": 1.0})
    jobs = private(jobs_with_rules(parts), sigma=2.0, noise=Secure)
    ended = many.train(parts.adapted, parts.task, config, jobs)
    far = [np.concatenate([(t.arrays[n] - j.start[n]).ravel() for n in j.names]) for j, t in zip(jobs, ended, strict=True)]
    assert max(abs(np.corrcoef(far[a], far[b])[0, 1]) for a in range(4) for b in range(a)) < 0.1


def test_a_private_run_charges_and_ends_as_with_one(tiny_settings, tmp_path):
    ended = {}
    for engine in ("one", "many"):
        settings = settings_with(tiny_settings, engine=engine, max_steps=2)
        settings |= {"strategy": {"num_rounds": 2}, "privacy": {"noise_multiplier": 2.0, "insecure_seed": 1}}
        ended[engine] = simulate(Config.from_dict(settings), tmp_path / engine)
    for name, array in ended["one"].arrays.items():
        np.testing.assert_allclose(array, ended["many"].arrays[name], atol=CLOSE, err_msg=name)
    ledgers = [[Ledger(file).history for file in sorted((tmp_path / e / "ledger").glob("*.jsonl"))] for e in ended]
    assert ledgers[0] == ledgers[1]
    assert all(len(history) == 2 for history in ledgers[1])
    assert "clients_fell_back" not in (tmp_path / "many" / "rounds.jsonl").read_text()
