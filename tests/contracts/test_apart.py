"""Records that do not stay apart are found: they share no pass of several clients, and are clipped one at a time."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft import Config
from fedpeft.privacy import per_example
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.ledger import Ledger
from fedpeft.simulations import privacy_audit
from fedpeft.simulations.assemble import assemble
from fedpeft.training import many, memory, one
from fedpeft.training.audited import ExampleStep
from tests.test_models import SMALL, TARGETS, bert, deberta, distilbert, gpt2, llama, modernbert, roberta, saved

from .engines import CLOSE, farthest, jobs_with_rules, no_dropout, said, settings_with


def fnet(vocabulary):
    from transformers import FNetConfig, FNetModel

    return FNetModel(FNetConfig(vocab_size=vocabulary, **SMALL))


def opt(vocabulary):
    from transformers import OPTConfig, OPTModel

    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    return OPTModel(OPTConfig(vocab_size=vocabulary, max_position_embeddings=64, dropout=0.0, pad_token_id=0, **sizes))


def deberta3(vocabulary):
    """Drops out its table of 2 x 8 distances, which all records share."""
    from transformers import DebertaV2Config, DebertaV2Model

    own = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8, "position_biased_input": False}
    return DebertaV2Model(DebertaV2Config(vocab_size=vocabulary, pooler_hidden_size=32, share_att_key=True, **own, **SMALL))


OURS = {fnet: ["dense"], opt: ["fc1", "fc2"], deberta3: ["value_proj"]}


@pytest.fixture
def build(tiny_settings, tiny_bert, tmp_path):
    def make_parts(make, privacy=None, dropout=False, **training):
        saved(make, tiny_bert, tmp_path / "base")
        adapter = {"name": "lora", "r": 4, "target_modules": {**OURS, **TARGETS}.get(make, "all-linear")}
        settings = {**tiny_settings, "adapter": adapter, "model": {"name": str(tmp_path / "base"), "dropout": dropout}}
        whole = settings_with(settings, **{"optimizer": "sgd", "learning_rate": 0.1, **training})
        config = Config.from_dict({**whole, "privacy": privacy})
        return config, assemble(config)

    return make_parts


def looked(parts):
    parts.adapted.apart.ready(parts.test)
    return parts.adapted.apart


@pytest.mark.parametrize("make", [bert, deberta, distilbert, gpt2, llama, modernbert, roberta])
def test_in_most_models_a_record_is_a_row(make, build):
    apart = looked(build(make, dropout=True)[1])
    assert (apart.by_row, apart.obstacle) == (True, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_of_a_base_in_half_precision_is_no_reason(dtype, tiny_settings):
    config = Config.from_dict({**tiny_settings, "model": {**tiny_settings["model"], "dtype": dtype}})
    assert looked(assemble(config)).by_row


def test_a_model_that_reads_padding_trains_one_client_at_a_time(build, caplog):
    config, parts = build(fnet)
    jobs = jobs_with_rules(parts)
    expected = one.train(parts.adapted, parts.task, config, jobs)
    assert farthest(expected, many.train(parts.adapted, parts.task, config, jobs)) == 0.0, "it is one itself"
    assert len(said(caplog)) == 1 and "depends on the others of its batch" in said(caplog)[0]
    assert not parts.adapted.apart.by_row


def test_tokens_in_one_row_after_another_are_no_obstacle_to_many_clients(build, caplog):
    config, parts = build(opt)
    jobs = jobs_with_rules(parts)
    expected = one.train(parts.adapted, parts.task, config, jobs)
    assert farthest(expected, many.train(parts.adapted, parts.task, config, jobs)) < CLOSE
    assert said(caplog) == []
    assert (parts.adapted.apart.by_row, parts.adapted.apart.obstacle) == (False, None)


def test_a_dropout_of_what_all_records_share_is_seen_where_its_size_is_that_of_a_pass(build, caplog, monkeypatch):
    """A table of 16 entries, and passes of 16 tokens: nothing in their shapes tells them apart."""
    monkeypatch.setattr(memory, "ON_CPU", 16)
    config, parts = build(deberta3, dropout=True)
    jobs = jobs_with_rules(parts)
    for job in jobs:
        job.data.inputs[:] = [{name: np.resize(values, 16) for name, values in row.items()} for row in job.data.inputs]
    expected = one.train(parts.adapted, parts.task, config, jobs)
    assert farthest(expected, many.train(parts.adapted, parts.task, config, jobs)) == 0.0, "it is one itself"
    assert len(said(caplog)) == 1 and "drops out (16, 32)" in said(caplog)[0]


def test_time_first_is_seen_whatever_the_sizes(build):
    """Where there are as many rows as tokens no shape shows it."""
    _, parts = build(bert)
    layer = parts.adapted.base.model.bert.encoder.layer[0]
    forward = layer.attention.self.query.forward
    layer.attention.self.query.forward = lambda states: forward(states.transpose(0, 1)).transpose(0, 1)
    assert not looked(parts).by_row


# --- what it means for privacy -------------------------------------------------------------------------------------------


PRIVATE = {"noise_multiplier": 2.0, "max_grad_norm": 0.01}  # less than any record's gradient


def stepping(build, make, tmp_path, engine, **others):
    config, parts = build(make, privacy=PRIVATE, engine=engine, **others)
    guard = parts.worker.guards[0]

    def made():
        return Guard(guard.plan, Ledger(tmp_path / "checks.jsonl"), guard.C, 0, None)

    return parts, ExampleStep(config, parts.adapted, parts.task, parts.worker.nodes[0].train, privacy_audit._moved(parts, config), made)


def most(step):
    """The largest part, in C, that a record has in a step, alone and beside others."""
    alone = [step.release([record], 0.0, step.C) for record in range(3)]
    beside = [step.release([record, *range(3, 7)], 0.0, step.C) - step.release(range(3, 7), 0.0, step.C) for record in range(3)]
    return max(float(np.linalg.norm(part)) for part in [*alone, *beside]) / step.C


@pytest.mark.parametrize("engine", ["one", "many"])
@pytest.mark.parametrize("make", [bert, opt, fnet])
def test_no_record_has_more_than_its_share(make, engine, build, tmp_path):
    _, step = stepping(build, make, tmp_path, engine)
    assert 0.9 < most(step) < 1.001


@pytest.mark.parametrize(("make", "least"), [(opt, 1.5), (fnet, 1.01)])
def test_without_the_trial_a_record_would_have_more(make, least, build, tmp_path, monkeypatch):
    """Planted: records are supposed to be rows, and a layer's rows to be records, as they are in most models."""
    parts, step = stepping(build, make, tmp_path, "one", head="frozen")
    parts.adapted.apart._ask, parts.adapted.apart.by_row = None, True
    rows_of = per_example._linear()
    monkeypatch.setattr(per_example, "_linear", lambda: lambda module, own, rows, records, x: rows_of(module, own, rows, len(x), x))
    assert most(step) > least


def test_masks_of_dropout_are_secret_under_privacy(build, tmp_path):
    """Two turns alike but for who may know the masks; without dropout they are the same to rounding."""
    config, parts = build(bert, privacy={"noise_multiplier": 1e-9, "max_grad_norm": 1.0}, dropout=True)
    guard, job = parts.worker.guards[0], jobs_with_rules(parts)[0]

    def turn():
        mechanism = guard.begin(1)
        taken = iter([np.full(len(job.data), 0.0)] * config.training.max_steps)
        real = mechanism.noise.uniform
        mechanism.noise.uniform = lambda count: next(taken) if count == len(job.data) else real(count)
        (trained,) = one.train(parts.adapted, parts.task, config, [type(job)(**{**vars(job), "private": mechanism})])
        return trained

    assert farthest([turn()], [turn()]) > 1e-4
    no_dropout(parts)
    assert farthest([turn()], [turn()]) < 1e-6
