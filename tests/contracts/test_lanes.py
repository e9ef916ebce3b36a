"""Passes side by side in threads: the numbers of one thread, the same bits each time, and nothing of another lane's."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch

from fedpeft import Config
from fedpeft.data.encoded import Encoded
from fedpeft.records import Failure
from fedpeft.simulations.assemble import assemble
from fedpeft.training import cohort, evaluate, lanes, many, memory, one, passes, stacked
from fedpeft.training.prefix import Prefix
from tests.test_models import TARGETS, deberta, distilbert, gemma, gpt2, llama, modernbert, qwen2, roberta, saved

from .engines import ADAPTERS, CLOSE, build_with, farthest, jobs_with_rules, said
from .test_engines_private import STEPS, private

COUNT = 3


@pytest.fixture
def used(monkeypatch):
    """Three lanes, and passes so short that each has several; the lanes that passes went through."""
    many._say.cache_clear()
    monkeypatch.setattr(memory, "lanes", lambda device: COUNT)
    monkeypatch.setattr(memory, "ON_CPU", 40 * COUNT)
    monkeypatch.setattr(passes, "FEWEST", 8)
    seen, forward = set(), cohort.CohortTraining._forward

    def watched(training, one_pass, lane=0):
        seen.add((lane, threading.current_thread().name.partition("_")[0]))
        return forward(training, one_pass, lane)

    monkeypatch.setattr(cohort.CohortTraining, "_forward", watched)
    return seen


def all_lanes(used):
    return {(lane, "lane") for lane in range(COUNT)} <= used


WAYS = {
    "plain": {},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "epochs": {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 3},
    "one client": {"clients": 1, "per_device_train_batch_size": 8},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adapter", ["lora", "fora", "miss"])
def test_lanes_are_one_client_by_client(adapter, way, tiny_settings, used, caplog):
    """With dropout, in the base and before the adapter."""
    config, parts = build_with(tiny_settings, ADAPTERS[adapter], **WAYS[way])
    jobs, ended = same_in_lanes(config, parts, used, caplog)
    assert farthest(ended, many.train(parts.adapted, parts.task, config, jobs)) == 0.0, "bit for bit, whichever lane was faster"


@pytest.mark.parametrize("make", [deberta, distilbert, gpt2, llama, modernbert, roberta, qwen2, gemma], ids=lambda make: make.__name__)
def test_models_of_every_kind_run_in_several_threads(make, tiny_settings, tiny_bert, tmp_path, used, caplog):
    saved(make, tiny_bert, tmp_path / "base")
    adapter = {"name": "lora", "r": 4, "target_modules": TARGETS.get(make, "all-linear")}
    settings = {**tiny_settings, "model": {"name": str(tmp_path / "base"), "dropout": False}}
    same_in_lanes(*build_with(settings, adapter, optimizer="sgd", learning_rate=0.1, max_steps=2), used, caplog)


@pytest.mark.parametrize("packing", [False, True])
def test_language_models_run_in_several_threads(packing, tiny_lm_settings, used, caplog):
    settings = {**tiny_lm_settings, "model": {**tiny_lm_settings["model"], "packing": packing}}
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "max_steps": 2}
    config = Config.from_dict({**settings, "training": {**settings["training"], **sgd}})
    same_in_lanes(config, assemble(config), used, caplog)


def test_a_model_that_remembers_has_one_lane(tiny_lm_settings, tiny_llama, tmp_path, used, caplog):
    """RecurrentGemma's layers keep the state at which they ended."""
    from transformers import AutoTokenizer, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "lru_width": 32}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "attention_window_size": 16}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        shape = RecurrentGemmaConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes, **ends)
        RecurrentGemmaForCausalLM(shape).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "max_steps": 2}
    config = Config.from_dict(
        {
            **tiny_lm_settings,
            "model": {**tiny_lm_settings["model"], "name": str(tmp_path / "base"), "dropout": False},
            "adapter": {"name": "lora", "r": 4, "target_modules": ["q_proj", "v_proj", "linear_x"]},
            "training": {**tiny_lm_settings["training"], **sgd},
        }
    )
    parts = assemble(config)
    jobs = jobs_with_rules(parts)
    left = one.train(parts.adapted, parts.task, config, jobs)
    assert farthest(left, many.train(parts.adapted, parts.task, config, jobs)) < CLOSE
    assert not said(caplog)
    assert {lane for lane, _ in used} == {0} and len(used) == 1


def test_what_a_forward_leaves_behind_is_seen():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))

    def left_behind(change):
        before = lanes.remembered(model)
        change()
        return not lanes.forgetful(before)

    assert not left_behind(lambda: None)
    assert left_behind(lambda: model(torch.ones(3, 2))), "running means"
    model.eval()
    assert not left_behind(lambda: model(torch.ones(3, 2)))
    assert left_behind(lambda: setattr(model[0], "state", torch.zeros(1)))
    assert left_behind(lambda: setattr(model[0], "state", torch.zeros(1)))
    assert left_behind(lambda: model[1].register_buffer("running_mean", torch.zeros(2)))


@pytest.mark.parametrize(("memory_gb", "lanes_used"), [(1e-5, {0}), (1.0, {0, 1, 2})])
def test_each_lane_has_room_for_a_row(memory_gb, lanes_used, tiny_settings, used):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], memory_gb=memory_gb, max_steps=1, clients_at_once=4)
    many.train(parts.adapted, parts.task, config, jobs_with_rules(parts))
    assert {lane for lane, _ in used} == lanes_used


def test_pictures_run_in_several_threads(tiny_picture_settings, used, caplog, monkeypatch):
    monkeypatch.setattr(passes, "FEWEST", 1)
    config = Config.from_dict(tiny_picture_settings)
    same_in_lanes(config, assemble(config), used, caplog)


def same_in_lanes(config, parts, used, caplog):
    """The jobs, and what came of them."""
    jobs = jobs_with_rules(parts)
    left = one.train(parts.adapted, parts.task, config, jobs)
    right = many.train(parts.adapted, parts.task, config, jobs)
    assert not said(caplog)
    assert all_lanes(used)
    assert farthest(left, right) < CLOSE
    return jobs, right


def test_private_lanes_are_one_client_by_client(tiny_settings, used, caplog):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], **STEPS)
    jobs = jobs_with_rules(parts)
    left, right, again = (engine.train(parts.adapted, parts.task, config, private(jobs)) for engine in (one, many, many))
    assert not said(caplog)
    assert all_lanes(used)
    assert farthest(left, right) < CLOSE
    assert farthest(right, again) == 0.0


@pytest.mark.parametrize("room", [1.0, 1e-5], ids=["all fits", "little fits"])
def test_kept_states_in_lanes(room, tiny_settings, used, caplog):
    top = {"name": "lora", "r": 4, "target_modules": r".*layer\.1\.attention\.self\.(query|value)"}
    settings = {**tiny_settings, "model": {**tiny_settings["model"], "dropout": False}}
    config, parts = build_with(settings, top, prefix_cache="memory", prefix_cache_gb=room, max_steps=6)
    jobs = jobs_with_rules(parts)
    ended = many.train(parts.adapted, parts.task, config, jobs)
    assert all_lanes(used)
    assert parts.adapted.prefix._in_training and parts.adapted.prefix._store._kept
    kept = evaluate.logits(parts.adapted, parts.test, 7)
    parts.adapted.prefix = Prefix(parts.adapted)
    np.testing.assert_allclose(kept, evaluate.logits(parts.adapted, parts.test, 7), atol=CLOSE)
    assert farthest(one.train(parts.adapted, parts.task, config, jobs), ended) < CLOSE


def test_what_breaks_in_a_lane_costs_one_client(tiny_settings, used):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], clients=5)
    jobs = jobs_with_rules(parts)
    far = [{**row, "input_ids": row["input_ids"] + 10**6} for row in jobs[1].data.inputs]  # token ids that no embedding has
    jobs[1] = dataclasses.replace(jobs[1], data=Encoded(far, jobs[1].data.labels, 3))
    left, right = one.train(parts.adapted, parts.task, config, jobs), many.train(parts.adapted, parts.task, config, jobs)
    assert isinstance(right[1], Failure) and right[1].reason == left[1].reason
    assert farthest(left[:1] + left[2:], right[:1] + right[2:]) < CLOSE


def test_the_processor_is_given_back(tiny_settings, used):
    before, threads = torch.get_num_threads(), threading.active_count()
    try:
        torch.set_num_threads(6)
        seen = []
        with lanes.Lanes[int]("cpu") as found:
            found.run([[1, 2], [3], [4]], lambda item, lane: seen.append((item, lane, torch.get_num_threads())))
            found.run([[5]], lambda item, lane: seen.append((item, lane, torch.get_num_threads())))
            found._threads = 7
            found.run([[6], [7], [8]], lambda item, lane: seen.append((item, lane, torch.get_num_threads())))
            found.run([[9], [10]], lambda item, lane: seen.append((item, lane, torch.get_num_threads())))
            found._threads = 6
        shares = [(6, 0, 3), (7, 1, 2), (8, 2, 2), (9, 0, 4), (10, 1, 3)]
        assert sorted(seen) == [(1, 0, 2), (2, 0, 2), (3, 1, 2), (4, 2, 2), (5, 0, 6), *shares]
        assert torch.get_num_threads() == 6 and threading.active_count() == threads
        started = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        started.start()
        started.join()
        assert seen[-1] == 6
    finally:
        torch.set_num_threads(before)


def two_lanes():
    pool = lanes.Lanes[str]("cpu")
    pool.count = 2
    return pool


def test_every_lane_has_ended_when_an_error_is_raised_and_does_no_more_than_it_had_begun():
    ended, begun = [], threading.Event()

    def work(item, lane):
        if item == "bad":
            begun.wait(10)
            raise ValueError("lane 0")
        begun.set()
        time.sleep(0.3)
        ended.append(item)

    with two_lanes() as pool:
        with pytest.raises(ValueError, match="lane 0"):
            pool.run([["bad", "never"], ["a", "b"]], work)
        assert ended == ["a"]
        pool.run([["c"], ["d"]], work)
    assert sorted(ended) == ["a", "c", "d"]


def test_an_error_keeps_nothing_alive():
    """Half of the memory that there is may hang on it."""

    class Cohort:
        def work(self, item, lane):
            raise ValueError(item)

    gc.disable()
    try:
        with two_lanes() as pool:
            cohort = Cohort()
            gone = weakref.ref(cohort)
            with pytest.raises(ValueError, match="a"):
                pool.run([["a"], ["b"]], cohort.work)
            del cohort
            for _ in range(100):  # the threads let go of it in their own time
                if gone() is None:
                    break
                time.sleep(0.01)
            assert gone() is None
    finally:
        gc.enable()


def test_a_gpu_has_one_lane():
    assert memory.lanes("cuda:0") == 1
    assert 1 <= memory.lanes("cpu") <= memory.MOST_LANES


ERRORS = {
    "gradients of one lane": (stacked.Stacked, "add_up", lambda self, n: None),
    "gradients added up twice": (stacked.Stacked, "add_up", lambda self, n: self.gradient[:n].add_(self.gradients.sum(0)[:n])),
}


@pytest.mark.parametrize("error", ERRORS)
def test_planted_errors_are_seen(error, tiny_settings, used, monkeypatch):
    config, parts = build_with(tiny_settings, ADAPTERS["lora"], optimizer="sgd", learning_rate=0.1)
    jobs = jobs_with_rules(parts)
    left = one.train(parts.adapted, parts.task, config, jobs)
    monkeypatch.setattr(*ERRORS[error])
    assert farthest(left, many.train(parts.adapted, parts.task, config, jobs)) > 10 * CLOSE


def test_a_cohort_seats_each_thread_for_itself():
    from fedpeft.training.stacked_layers import Cohort

    table, seen = Cohort({"x": 1}, {}, {}), []
    table.sit([0, 0, 1], 5, "cpu", lane=2)

    def look():
        seen.append((table.tensors, table.seats, table.lane))
        table.sit([4], 7, "cpu", lane=1)

    other = threading.Thread(target=look)
    other.start()
    other.join()
    assert seen == [({"x": 1}, None, 0)]
    assert (table.seats.tolist(), table.time, table.lane) == ([0, 0, 1], 5, 2)
    np.testing.assert_array_equal(table.present.numpy(), [0, 1])
