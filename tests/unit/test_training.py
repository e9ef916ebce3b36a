"""The reference engine against a loop written out by hand, and its habits: determinism, schedules, frozen tensors."""

import numpy as np
import pytest
import torch

from fedpeft import Config
from fedpeft.arrays import digest
from fedpeft.data.encoded import Encoded
from fedpeft.records import Failure
from fedpeft.simulations.assemble import assemble
from fedpeft.training import one, schedules
from fedpeft.training.job import Job, batches, local_steps


def build(settings, **training):
    config = Config.from_dict({**settings, "training": {**settings["training"], **training}})
    return config, assemble(config)


def job_of(parts, client=0, round=1):
    return Job(client, round, parts.adapted.read(), parts.adapted.trained, parts.worker.nodes[client].train)


def by_hand(parts, config, job, optimizer):
    """AdamW or SGD on the mean loss of each batch: no accumulation, no clipping, no schedule."""
    parts.adapted.write(job.start)
    parts.adapted.model.eval()  # the tiny model's dropout is set to zero below
    trainable = [p for p in parts.adapted.model.parameters() if p.requires_grad]
    optimizer = optimizer(trainable)
    for (rows,) in batches(config, job):
        inputs, labels = job.data.batch(rows, parts.adapted.base.tokenizer, "cpu")
        loss = torch.nn.functional.cross_entropy(parts.adapted.model(**inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parts.adapted.parameters[name].detach().numpy().copy() for name in parts.adapted.trained}


def without_dropout(parts):
    for module in parts.adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("adamw", lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0)), ("sgd", lambda p: torch.optim.SGD(p, lr=1e-2))],
)
def test_engine_one_is_the_loop_written_by_hand(tiny_settings, name, optimizer):
    config, parts = build(tiny_settings, optimizer=name, max_grad_norm=None, max_steps=5)
    without_dropout(parts)
    job = job_of(parts)
    (trained,) = one.train(parts.adapted, parts.task, config, [job])
    expected = by_hand(parts, config, job, optimizer)
    assert trained.steps == 5
    for name, array in trained.arrays.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6)
        assert np.abs(array - job.start[name]).max() > 0 or "lora_A" in name, name  # A waits until B has left zero


def test_accumulated_batches_equal_one_large_batch(tiny_settings):
    small, parts = build(tiny_settings, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1)
    without_dropout(parts)
    job = job_of(parts)
    assert len(job.data) >= 8, "needs full batches"
    (left,) = one.train(parts.adapted, parts.task, small, [job])
    large, _ = build(tiny_settings, per_device_train_batch_size=8, max_steps=1)
    (right,) = one.train(parts.adapted, parts.task, large, [job])
    for name, array in left.arrays.items():
        np.testing.assert_allclose(array, right.arrays[name], atol=1e-5)


def test_clipping_bounds_the_gradient(tiny_settings):
    config, parts = build(tiny_settings, optimizer="sgd", learning_rate=1.0, max_grad_norm=1e-3, max_steps=1)
    job = job_of(parts)
    (trained,) = one.train(parts.adapted, parts.task, config, [job])
    moved = np.sqrt(sum(((trained.arrays[name] - job.start[name]) ** 2).sum() for name in trained.arrays))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_a_client_trains_alike_whoever_trained_before_it(tiny_settings):
    config, parts = build(tiny_settings, max_steps=3)  # dropout is on: its generator is the client's own
    jobs = [job_of(parts, client) for client in range(3)]
    together = one.train(parts.adapted, parts.task, config, jobs)
    (alone,) = one.train(parts.adapted, parts.task, config, [jobs[2]])
    for name, array in alone.arrays.items():
        assert np.array_equal(array, together[2].arrays[name])


def test_dropout_differs_between_clients_and_rounds(tiny_settings):
    config, parts = build(tiny_settings, max_steps=1, per_device_train_batch_size=1000)
    first, again = (one.train(parts.adapted, parts.task, config, [job_of(parts, round=round)])[0] for round in (1, 2))
    assert first.loss != again.loss, "the whole data in one batch: only dropout can differ"


def test_frozen_tensors_stay_bit_identical(tiny_settings):
    config, parts = build(tiny_settings, head="frozen")
    before = {name: p.detach().clone() for name, p in parts.adapted.model.named_parameters() if not p.requires_grad}
    job = job_of(parts)
    (trained,) = one.train(parts.adapted, parts.task, config, [job])
    assert not any("classifier" in name for name in trained.arrays)
    for name, parameter in parts.adapted.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_learning_rate_follows_the_whole_run(tiny_settings):
    config, parts = build(tiny_settings, lr_scheduler_type="linear", optimizer="sgd", max_grad_norm=None, max_steps=1)
    without_dropout(parts)
    moved = []
    for round in (1, 3):
        job = job_of(parts, round=round)
        (trained,) = one.train(parts.adapted, parts.task, config, [job])
        moved.append(max(np.abs(trained.arrays[name] - job.start[name]).max() for name in trained.arrays))
    assert moved[1] < moved[0], "3 rounds of 1 step: the last step has a third of the rate"


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        (schedules.constant, 7, 1.0),
        (schedules.linear, 5, 0.5),
        (schedules.cosine, 5, 0.5),
        (schedules.linear, 10, 0.0),
        (schedules.cosine, 0, 1.0),
    ],
)
def test_schedules(schedule, step, expected):
    assert schedules.factor(schedule, step, 10, 0.0) == pytest.approx(expected)


def test_warm_up_rises_to_the_peak():
    assert [schedules.factor(schedules.constant, step, 10, 0.4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_every_pass_sees_each_example_once(tiny_settings):
    config, parts = build(tiny_settings, num_train_epochs=3, max_steps=None, per_device_train_batch_size=5)
    job = job_of(parts)
    n = len(job.data)
    dealt = [rows for step in batches(config, job) for rows in step]
    passes = -(-n // 5)
    assert len(dealt) == local_steps(config, n) == 3 * passes
    for start in range(0, len(dealt), passes):
        assert sorted(np.concatenate(dealt[start : start + passes])) == list(range(n))


def test_one_pass_with_accumulation_is_one_pass(tiny_settings):
    config, parts = build(tiny_settings, num_train_epochs=1, max_steps=None, per_device_train_batch_size=4, gradient_accumulation_steps=8)
    job = job_of(parts)
    steps = batches(config, job)
    assert len(steps) == local_steps(config, len(job.data))
    assert sorted(np.concatenate([rows for step in steps for rows in step])) == list(range(len(job.data)))


def test_a_client_that_breaks_is_a_failure_and_the_others_train(tiny_settings):
    config, parts = build(tiny_settings)
    jobs = [job_of(parts, client) for client in range(3)]
    far = [{**row, "input_ids": row["input_ids"] + 10**6} for row in jobs[1].data.inputs]  # token ids that no embedding has
    jobs[1] = Job(1, 1, jobs[1].start, jobs[1].names, Encoded(far, jobs[1].data.labels, 3))
    first, broken, last = one.train(parts.adapted, parts.task, config, jobs)
    assert isinstance(broken, Failure)
    assert broken.reason.startswith("training broke: ")
    (alone,) = one.train(parts.adapted, parts.task, config, [jobs[2]])
    assert digest(alone.arrays) == digest(last.arrays)
    assert first.steps == 2


def test_a_bfloat16_base_trains_a_float32_adapter_and_head(tiny_settings):
    config = Config.from_dict({**tiny_settings, "model": {**tiny_settings["model"], "dtype": "bfloat16"}})
    parts = assemble(config)
    (trained,) = one.train(parts.adapted, parts.task, config, [job_of(parts)])
    assert {array.dtype for array in trained.arrays.values()} == {np.dtype("float32")}
    assert parts.adapted.base.model.get_input_embeddings().weight.dtype == torch.bfloat16
