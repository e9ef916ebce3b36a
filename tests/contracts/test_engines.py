"""Engine `many` against the reference: client by client the same numbers, whoever shares a pass."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedpeft import Config, frozen_linear, simulate
from fedpeft.data.encoded import Encoded
from fedpeft.records import Failure, merge_names, merged_round
from fedpeft.simulations.assemble import assemble
from fedpeft.training import cohort, many, one, seating
from fedpeft.training.job import Job, rates
from fedpeft.training.masks import Masks
from fedpeft.training.optimizers import StackedAdamW
from fedpeft.training.passes import Pass
from fedpeft.training.rules import Rules

from .engines import CLOSE, farthest, moved, no_dropout, said, settings_with


@pytest.fixture(autouse=True)
def _said_again():
    """What is said once a process is said once a test."""
    many._say.cache_clear()
    many._ran_out.cache_clear()


def build(settings, adapter=None, clients=4, **training):
    config = Config.from_dict(settings_with(settings, adapter, clients, **training))
    return config, assemble(config)


def jobs_of(parts, trains=lambda name: True, ranks=None, round=2):
    """A job a client: factors of its own in which neither A nor B is zero, and a head of its own."""
    pairs = {name: pair for pair in parts.adapted.layout().pairs for name in (pair.A, pair.B)}
    drawn = parts.adapted.read()
    jobs = []
    for client, node in parts.worker.nodes.items():
        generator = np.random.default_rng(client)
        start = {name: (array + 0.05 * generator.standard_normal(array.shape)).astype(np.float32) for name, array in drawn.items()}
        if ranks:
            r = ranks[client % len(ranks)]
            start |= {name: array[:r] if name == pairs[name].A else array[:, :r] for name, array in start.items() if name in pairs}
        names = tuple(name for name in parts.adapted.trained if trains(name))
        jobs.append(Job(client, round, start, names, node.train))
    return jobs


def both(config, parts, jobs, caplog):
    left = one.train(parts.adapted, parts.task, config, jobs)
    right = many.train(parts.adapted, parts.task, config, jobs)
    assert not said(caplog), "fell back: there is nothing to compare"
    return left, right


CASES = {
    "plain": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "rslora": {"adapter": {"use_rslora": True}},
    "lora dropout": {"adapter": {"lora_dropout": 0.3}},
    "one client": {"clients": 1},
    "three clients": {"clients": 3},
    "unclipped": {"max_grad_norm": None},
    "clipped hard": {"max_grad_norm": 1e-2, "optimizer": "sgd", "learning_rate": 0.5},
    "warm-up and cosine": {"warmup_ratio": 0.5, "lr_scheduler_type": "cosine"},
    "epochs": {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 3},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "epochs and accumulation": {
        "max_steps": None,
        "num_train_epochs": 1.5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "few at once": {"clients_at_once": 2, "clients": 5},
}


@pytest.mark.parametrize("dropout", ["no dropout", "dropout"])
@pytest.mark.parametrize("case", CASES)
def test_many_is_one_client_by_client(case, dropout, tiny_settings, caplog):
    config, parts = build(tiny_settings, **CASES[case])
    if dropout == "no dropout":
        no_dropout(parts)
    jobs = jobs_of(parts)
    left, right = both(config, parts, jobs, caplog)
    assert moved(jobs, left) > 0
    assert farthest(left, right) < CLOSE


def test_32_clients_in_short_passes(tiny_settings, caplog, monkeypatch):
    monkeypatch.setattr("fedpeft.training.memory.ON_CPU", 40)
    monkeypatch.setattr("fedpeft.training.memory.PASSES", 3)
    config, parts = build(tiny_settings, clients=32, adapter={"lora_dropout": 0.1}, max_steps=2)
    assert farthest(*both(config, parts, jobs_of(parts), caplog)) < CLOSE


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "classifier"])
def test_frozen_tensors(frozen, tiny_settings, caplog):
    config, parts = build(tiny_settings)
    jobs = jobs_of(parts, trains=lambda name: frozen not in name)
    left, right = both(config, parts, jobs, caplog)
    assert not any(frozen in name for name in right[0].arrays)
    assert farthest(left, right) < CLOSE


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_of_their_own(use_rslora, tiny_settings, caplog):
    config, parts = build(tiny_settings, adapter={"use_rslora": use_rslora, "r": 8})
    jobs = jobs_of(parts, ranks=[1, 4, 8, 2])
    assert farthest(*both(config, parts, jobs, caplog)) < CLOSE


def test_pulls_and_drifts(tiny_settings, caplog):
    config, parts = build(tiny_settings)
    generator = np.random.default_rng(0)
    jobs = [
        dataclasses.replace(
            job,
            proximal=0.5 * job.client,
            drift={name: generator.standard_normal(job.start[name].shape).astype(np.float32) for name in job.names[job.client :]},
        )
        for job in jobs_of(parts)
    ]
    left, right = both(config, parts, jobs, caplog)
    assert farthest(left, right) < CLOSE
    assert farthest(left, one.train(parts.adapted, parts.task, config, jobs_of(parts))) > 100 * CLOSE


def merges(job, layout, round, rank, seed, size=0.1):
    generator = np.random.default_rng(seed)
    found = {}
    for pair in layout.pairs:
        left, right = merge_names(round, pair.module)
        found[left] = (size * generator.standard_normal((job.start[pair.B].shape[0], rank))).astype(np.float32)
        found[right] = (size * generator.standard_normal((rank, job.start[pair.A].shape[1]))).astype(np.float32)
    return found


def test_rules_of_single_tensors(tiny_settings, caplog):
    """LoRA-FA's multipliers, each client's own, and learning rates that differ between tensors."""
    config, parts = build(tiny_settings, learning_rate=1e-2)
    generator = np.random.default_rng(0)
    pairs = parts.adapted.layout().pairs
    jobs = [
        dataclasses.replace(
            job,
            rules=Rules(
                factors={pairs[0].B: 0.1, pairs[1].A: 3.0},
                multipliers={pair.B: generator.normal(size=(4, 4)).astype(np.float32) for pair in pairs},
            ),
        )
        for job in jobs_of(parts)
    ]
    left, right = both(config, parts, jobs, caplog)
    assert farthest(left, right) < CLOSE
    plain = one.train(parts.adapted, parts.task, config, jobs_of(parts))
    assert farthest(left, plain) > 1e-3


def test_backbones_of_their_own(tiny_settings, caplog):
    """Rounds 1 and 2 are merged everywhere; round 3 at clients 1 to 3, each its own and of its own rank."""
    config, parts = build(tiny_settings, adapter={"lora_dropout": 0.2})
    layout, jobs = parts.adapted.layout(), []
    for job in jobs_of(parts, round=3):
        merged = {**merges(job, layout, 1, 2, seed=1), **merges(job, layout, 2, 40, seed=2)}
        merged |= merges(job, layout, 3, job.client, seed=10 + job.client) if job.client else {}
        jobs.append(dataclasses.replace(job, start={**job.start, **merged}))
    left, right = both(config, parts, jobs, caplog)
    assert farthest(left, right) < CLOSE
    bare = one.train(
        parts.adapted, parts.task, config, [dataclasses.replace(jobs[3], start={**jobs[3].start, **merges(jobs[3], layout, 3, 3, 0)})]
    )
    assert farthest(left[3:], bare) > 100 * CLOSE


@pytest.mark.parametrize("adapter", [{}, {"lora_dropout": 0.2}], ids=["base dropout", "adapter dropout too"])
def test_numbers_do_not_depend_on_who_shares_a_pass(adapter, tiny_settings):
    config, parts = build(tiny_settings, adapter, clients=8, max_steps=None, num_train_epochs=1)
    jobs = jobs_of(parts)
    whole = many.train(parts.adapted, parts.task, config, jobs)
    some = many.train(parts.adapted, parts.task, config, [jobs[5], jobs[1], jobs[2]])
    alone = many.train(parts.adapted, parts.task, config, [jobs[1]])
    assert farthest([whole[5], whole[1], whole[2], whole[1]], [*some, *alone]) < 1e-6


def test_a_client_that_breaks_costs_itself(tiny_settings):
    config, parts = build(tiny_settings, clients=5)
    jobs = jobs_of(parts)
    far = [{**row, "input_ids": row["input_ids"] + 10**6} for row in jobs[1].data.inputs]  # token ids that no embedding has
    jobs[1] = dataclasses.replace(jobs[1], data=Encoded(far, jobs[1].data.labels, 3))
    before = {name: vars(module).get("forward") for name, module in parts.adapted.model.named_modules()}
    left, right = one.train(parts.adapted, parts.task, config, jobs), many.train(parts.adapted, parts.task, config, jobs)
    assert isinstance(right[1], Failure) and right[1].reason == left[1].reason
    assert farthest(left[:1] + left[2:], right[:1] + right[2:]) < CLOSE
    assert {name: vars(module).get("forward") for name, module in parts.adapted.model.named_modules()} == before


def test_a_frozen_head_computes_afterwards_as_before(tiny_settings, monkeypatch):
    """It has no gradient, but its forward is replaced while many train."""
    monkeypatch.setattr(frozen_linear, "gains", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    config, parts = build({**tiny_settings, "training": {**tiny_settings["training"], "head": "frozen"}})
    before = {name: vars(module).get("forward") for name, module in parts.adapted.model.named_modules()}
    many.train(parts.adapted, parts.task, config, jobs_of(parts))
    assert {name: vars(module).get("forward") for name, module in parts.adapted.model.named_modules()} == before


def test_numbers_that_are_not_finite_stay_with_their_client(tiny_settings):
    config, parts = build(tiny_settings)
    jobs = jobs_of(parts)
    jobs[2] = dataclasses.replace(jobs[2], start={name: array * np.float32(np.nan) for name, array in jobs[2].start.items()})
    left, right = one.train(parts.adapted, parts.task, config, jobs), many.train(parts.adapted, parts.task, config, jobs)
    assert np.isnan(left[2].loss) and np.isnan(right[2].loss)
    assert not any(np.isfinite(array).all() for array in right[2].arrays.values())
    assert farthest(left[:2] + left[3:], right[:2] + right[3:]) < CLOSE


def test_jobs_of_different_tensors_go_in_cohorts_of_their_own(tiny_settings, caplog):
    config, parts = build(tiny_settings)
    some = jobs_of(parts, trains=lambda name: "lora_A" not in name)
    jobs = [some[job.client] if job.client % 2 else job for job in jobs_of(parts)]
    assert farthest(*both(config, parts, jobs, caplog)) < CLOSE


def test_out_of_memory_halves_the_cohort(tiny_settings, caplog, monkeypatch):
    config, parts = build(tiny_settings, clients=6)
    jobs = jobs_of(parts)
    expected = one.train(parts.adapted, parts.task, config, jobs)
    run, sizes = cohort.CohortTraining.run, []

    def small(training):
        sizes.append(len(training.jobs))
        if len(training.jobs) > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return run(training)

    monkeypatch.setattr(cohort.CohortTraining, "run", small)
    assert farthest(expected, many.train(parts.adapted, parts.task, config, jobs)) < CLOSE
    assert sizes == [6, 3, 3]
    assert len(said(caplog)) == 1 and "out of GPU memory with 6 clients" in said(caplog)[0]


def test_a_small_budget_makes_small_cohorts(tiny_settings, caplog):
    config, parts = build(tiny_settings, memory_gb=2e-4)  # 200 kB: one client, few tokens
    assert farthest(*both(config, parts, jobs_of(parts), caplog)) < CLOSE


def falls_back(parts, config, caplog, reason):
    jobs = jobs_of(parts)
    expected = one.train(parts.adapted, parts.task, config, jobs)
    for _ in range(2):
        ended = many.train(parts.adapted, parts.task, config, jobs)
        assert farthest(expected, ended) == 0.0, "it is one itself"
        assert all(trained.fell_back for trained in ended)
    assert len(said(caplog)) == 1 and reason in said(caplog)[0]


class Router(torch.nn.Module):
    """Experts of bounded capacity: who comes too late gets none."""

    expert_capacity = 64


@pytest.mark.parametrize(
    ("module", "reason"),
    [(torch.nn.BatchNorm1d(3), "mixing normalises over the rows of a batch"), (Router(), "mixing routes the rows of a batch")],
)
def test_a_layer_that_mixes_rows_falls_back(module, reason, tiny_settings, caplog):
    config, parts = build(tiny_settings)
    parts.adapted.model.add_module("mixing", module)
    falls_back(parts, config, caplog, reason)


def test_a_layer_that_does_not_keep_rows_apart_falls_back(tiny_settings, caplog):
    """Time first, as some models have it inside."""
    config, parts = build(tiny_settings)
    layer = parts.adapted.base.model.bert.encoder.layer[0]
    forward = layer.forward
    layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].transpose(0, 1), *inputs[1:]))
    layer.forward = lambda states, *args, **named: forward(functional.dropout(states, 0.1, layer.training).transpose(0, 1), *args, **named)
    falls_back(parts, config, caplog, "which is not one entry a row")


def test_an_adapter_without_a_stacked_form_falls_back(tiny_settings, caplog):
    config, parts = build(tiny_settings)
    pair = parts.adapted.layout().pairs[0]
    parts.adapted.add_sparse({pair.module: np.arange(3)})
    falls_back(parts, config, caplog, "values train inside frozen weights")


def test_an_optimizer_without_a_stacked_form_falls_back(tiny_settings, caplog, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef adagrad(parameters, rate, decay):\n    return torch.optim.Adagrad(parameters, lr=rate)\n"
    )
    config, parts = build(tiny_settings, optimizer=f"{tmp_path / 'mine.py'}:adagrad")
    falls_back(parts, config, caplog, "has no form for many clients")


def test_a_model_with_randomness_of_its_own_falls_back(tiny_settings, caplog):
    config, parts = build(tiny_settings)
    layer = parts.adapted.base.model.bert.encoder.layer[0]
    layer.register_forward_hook(lambda layer, inputs, output: output + 1e-3 * torch.randn(()) if layer.training else output)
    falls_back(parts, config, caplog, "random numbers of its own")


def test_a_bfloat16_base(tiny_settings, caplog):
    config, parts = build({**tiny_settings, "model": {**tiny_settings["model"], "dtype": "bfloat16"}}, optimizer="sgd")
    no_dropout(parts)
    left, right = both(config, parts, jobs_of(parts), caplog)
    assert farthest(left, right) < 2e-3  # bfloat16 rounds the activations to 3 digits, and padding changes the rounding
    assert all(array.dtype == np.float32 for trained in right for array in trained.arrays.values())


def test_the_rounds_of_a_run_say_that_its_engine_fell_back(tiny_settings, tmp_path):
    (tmp_path / "mine.py").write_text("from fedpeft.training.optimizers import sgd as mine\n")
    settings = settings_with(tiny_settings, engine="many", optimizer=f"{tmp_path / 'mine.py'}:mine", max_steps=1)
    run = simulate(Config.from_dict({**settings, "strategy": {"num_rounds": 1}}), tmp_path / "run")
    (record,) = (line for line in map(json.loads, (run.folder / "rounds.jsonl").read_text().splitlines()) if line["round"] == 1)
    assert record["report"]["clients_fell_back"] == 1.0


STRATEGIES = ["fedavg", "ffa_lora", "lora_fair", "fedsmooth_lora", "ro_lora", "flora", "scaffold", "fedprox", "fedsa_lora", "het_lora"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_runs_agree(strategy, tiny_settings, tmp_path):
    ended = {}
    for engine in ("one", "many"):
        own = {"optimizer": "sgd", "learning_rate": 0.1} if strategy == "scaffold" else {}
        settings = settings_with(tiny_settings, engine=engine, max_steps=2, **own)
        settings["strategy"] = {"name": strategy, "num_rounds": 2}
        ended[engine] = simulate(Config.from_dict(settings), tmp_path / engine)
    left, right = (as_products(ended[engine].arrays) for engine in ("one", "many"))
    assert list(left) == list(right)
    for name, array in left.items():
        np.testing.assert_allclose(array, right[name], atol=CLOSE, err_msg=name)
    assert ended["one"].summary["metrics"] == pytest.approx(ended["many"].summary["metrics"], abs=1e-4)


def as_products(arrays):
    """What was merged as whole matrices: of factors only the product is determined."""
    found = {name: array for name, array in arrays.items() if merged_round(name) < 0}
    for name in (name for name in arrays if name.endswith(".left")):
        found[name] = arrays[name] @ arrays[name.removesuffix("left") + "right"]
    return found


SCALINGS, SHIFTS = seating.scalings, seating.shifts
SEATS, ADAMW = Pass.seats, StackedAdamW.step


def clipped_together(gradients, norm):
    gradients.mul_((norm / (gradients.norm() + 1e-6)).clamp(max=1.0))


def decayed_twice(optimizer, values, gradients, rates):
    ADAMW(optimizer, values, gradients, rates)
    values[0].mul_(1 - rates[0] * optimizer.weight_decay)


def drawn_again(masks, question, shape, keep):
    masks.drawn.append(torch.empty(shape, dtype=torch.bool).bernoulli_(keep, generator=masks.generator))
    return masks.drawn[-1]


ERRORS = {  # one of each kind that training many clients together invites
    "scaling dropped": (seating, "scalings", lambda *given: {k: torch.ones_like(s) for k, s in SCALINGS(*given).items()}),
    "scaling of another": (seating, "scalings", lambda *given: {k: s[:1].expand_as(s) for k, s in SCALINGS(*given).items()}),
    "clipped together": (cohort, "_clip", clipped_together),
    "decayed twice": (StackedAdamW, "step", decayed_twice),
    "rates of another": (StackedAdamW, "step", lambda self, v, g, r: ADAMW(self, v, g, r[:1].expand_as(r))),
    "rates of another round": (cohort, "rates", lambda config, examples, round: rates(config, examples, 1)),
    "mean over the wrong records": (Pass, "shares", lambda self: self.of_rows([1.0 / len(part.batch.rows) for part in self.parts])),
    "adapter of the neighbour": (Pass, "seats", lambda self: [max(0, seat - 1) for seat in SEATS(self)]),
    "one generator for all": (cohort, "dropout_seed", lambda config, job: 0),
    "masks in the order of passes": (Masks, "get", drawn_again),
    "backbones forgotten": (seating, "shifts", lambda *given: [0 * side for side in SHIFTS(*given)]),
    "pulled to zero": (torch.Tensor, "clone", lambda values: torch.zeros_like(values)),
}


@pytest.mark.parametrize("error", ["none", *ERRORS])
def test_planted_errors_are_seen(error, tiny_settings, monkeypatch, caplog):
    """One set of jobs in which everything differs between clients agrees with `one`, and with no error planted in it."""
    config, parts = build(
        tiny_settings,
        adapter={"r": 8, "lora_dropout": 0.1},
        max_steps=None,
        num_train_epochs=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-2,
    )
    monkeypatch.setattr("fedpeft.training.memory.ON_CPU", 40)
    jobs = []
    for job in jobs_of(parts, ranks=[2, 8, 4]):
        merged = merges(job, parts.adapted.layout(), 2, 2, seed=job.client)
        jobs.append(dataclasses.replace(job, start={**job.start, **merged}, proximal=0.2 * job.client))
    left = one.train(parts.adapted, parts.task, config, jobs)
    if error in ERRORS:
        monkeypatch.setattr(*ERRORS[error])
    off = farthest(left, many.train(parts.adapted, parts.task, config, jobs))
    assert not said(caplog)
    assert off < CLOSE if error == "none" else off > 10 * CLOSE
