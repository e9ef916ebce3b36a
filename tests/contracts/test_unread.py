"""Tokens that nobody reads are left out, those that somebody reads are not, and no number changes."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft import Config
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate, many, one, unread
from fedpeft.training.unread import Unread
from tests.test_models import TARGETS, bart, bert, bert_without_pooler, deberta, distilbert, gpt2, llama, modernbert, roberta, saved

from .engines import CLOSE, farthest, jobs_with_rules, no_dropout, settings_with

LEFT_OUT = {bert: True, roberta: True, bert_without_pooler: True, deberta: True}
ALL_READ = {distilbert: False, modernbert: False, bart: False, gpt2: False, llama: False}  # they are not made so, or read another token


@pytest.fixture
def build(tiny_settings, tiny_bert, tmp_path):
    def make_parts(make):
        saved(make, tiny_bert, tmp_path / "base")
        adapter = {"name": "lora", "r": 4, "target_modules": TARGETS.get(make, "all-linear")}
        settings = settings_with({**tiny_settings, "adapter": adapter, "model": {"name": str(tmp_path / "base")}})
        config = Config.from_dict(settings)
        return config, assemble(config)

    return make_parts


@pytest.mark.parametrize(("make", "left_out"), {**LEFT_OUT, **ALL_READ}.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_nothing_changes_but_the_work(make, left_out, build):
    config, parts = build(make)
    no_dropout(parts)
    jobs = jobs_with_rules(parts)
    parts.adapted.unread, looks = Unread(parts.adapted), parts.adapted.unread
    plain = {engine: engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many)}
    parts.adapted.write(jobs[0].start)
    logits = evaluate.logits(parts.adapted, parts.test, 7)
    parts.adapted.unread = looks
    np.testing.assert_allclose(evaluate.logits(parts.adapted, parts.test, 7), logits, atol=CLOSE * max(1.0, float(np.abs(logits).max())))
    assert (looks.left_out_at is not None) == left_out
    for engine in (one, many):
        assert farthest(plain[engine], engine.train(parts.adapted, parts.task, config, jobs)) < CLOSE


def test_one_token_a_row_goes_through_the_end_of_the_last_layer(build):
    _, parts = build(bert)
    seen = []
    layer = parts.adapted.base.model.bert.encoder.layer[-1]
    layer.output.register_forward_hook(lambda module, given, output: seen.append(tuple(output.shape)))
    evaluate.logits(parts.adapted, parts.test, 6)
    assert parts.adapted.unread.left_out_at == "base_model.model.bert.encoder.layer.1.attention.output"
    assert seen[-1] == (6, 1, 32)


@pytest.fixture
def all_read(build):
    """A model that reads the mean of all tokens, through a head of zeros: its logits are all the same, whatever is read."""
    _, parts = build(bert)
    pooler, classifier = parts.adapted.base.model.bert.pooler, parts.adapted.base.model.classifier
    pooler.forward = lambda hidden: pooler.activation(pooler.dense(hidden.mean(1)))
    for parameter in classifier.parameters():
        parameter.data.zero_()
    return parts


def test_a_head_of_zeros_hides_no_reader(all_read):
    evaluate.logits(all_read.adapted, all_read.test, 7)
    assert all_read.adapted.unread.left_out_at is None


def test_without_the_poison_the_reader_would_be_missed(all_read, monkeypatch):
    """A planted error: what is left out is only seen to change no output here."""
    monkeypatch.setattr(unread, "_poisoned", lambda module, args: args)
    evaluate.logits(all_read.adapted, all_read.test, 7)
    assert all_read.adapted.unread.left_out_at is not None


def test_texts_of_one_token_say_nothing_and_the_longest_are_looked_at(build):
    """Else a client whose first texts are that short would do other sums than the simulation of it."""
    _, parts = build(bert)
    data = parts.test.take(np.arange(4))
    data.inputs[:] = [{name: values[:1] for name, values in row.items()} for row in data.inputs]
    parts.adapted.unread.ready(data)
    assert parts.adapted.unread.left_out_at is None
    data.inputs[-1] = parts.test.inputs[3]
    parts.adapted.unread.ready(data)
    assert parts.adapted.unread.left_out_at is not None


def test_a_pass_that_breaks_leaves_no_hook_behind(build):
    _, parts = build(bert)

    def hooks():
        return sum(len(module._forward_pre_hooks) for module in parts.adapted.model.modules())

    def broken(model, inputs, labels):
        assert hooks() > before
        raise ValueError("no such thing")

    before = hooks()
    with pytest.raises(ValueError, match="no such thing"):
        Unread(parts.adapted, broken).ready(parts.test)
    assert hooks() == before
