"""Classification of texts: pairs, several classes a text, decoders, rows that hold nothing, and what is said of each client."""

import csv
import json
import warnings

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError, simulate
from fedpeft.data import partitions
from fedpeft.simulations.assemble import assemble, deal
from fedpeft.tasks import classes
from fedpeft.training import many, one
from fedpeft.training.evaluate import evaluate
from fedpeft.training.job import Job

TRUTH, PREDICTED = [0, 1, 2, 2, 1, 0, 2, 0, 1, 2], [0, 1, 2, 1, 1, 0, 0, 0, 2, 2]
SETS = [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]]
GUESSED = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_metrics_of_one_class_a_text_are_those_of_sklearn():
    from sklearn import metrics

    found = classes.metrics(np.eye(3)[PREDICTED] * 4.0, np.array(TRUTH))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(TRUTH, PREDICTED))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(TRUTH, PREDICTED, average="macro"))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(TRUTH, PREDICTED))


def test_metrics_of_sets_are_those_of_sklearn():
    from sklearn import metrics

    truth, guessed = np.array(SETS), np.array(GUESSED)
    found = classes.metrics(guessed * 2.0 - 1.0, truth.astype(np.float32))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, guessed))
    for average in ("macro", "micro"):
        assert found[f"{average}_f1"] == pytest.approx(metrics.f1_score(truth, guessed, average=average))
    each = [metrics.matthews_corrcoef(truth[:, code], guessed[:, code]) for code in range(3)]
    assert found["matthews"] == pytest.approx(np.mean(each))


@pytest.mark.parametrize("constant", [0, 1])
def test_matthews_of_a_constant_is_nothing_and_of_the_truth_one(constant):
    assert classes.matthews(np.full(10, constant), np.array(TRUTH)) == 0.0
    assert classes.matthews(np.array(TRUTH), np.array(TRUTH)) == pytest.approx(1.0)


@pytest.fixture
def many_topics(tmp_path):
    """64 texts with any of three topics each, as JSON Lines with lists, and as CSV with a delimiter."""
    words = {"sport": "the team won the match", "money": "the bank raised its rates", "space": "the rocket reached its orbit"}
    rows = []
    for number in range(64):
        chosen = [topic for place, topic in enumerate(words) if number >> place & 1]
        rows.append({"text": " and ".join(words[topic] for topic in chosen) or "nothing happened", "topics": chosen})
    (tmp_path / "lists.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "cells.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "topics"], *([row["text"], "|".join(row["topics"])] for row in rows)])
    return tmp_path


def sets_config(tiny_settings, file, **changes):
    model = {**tiny_settings["model"], "multi_label": True, "label_delimiter": "|"}
    data = {**tiny_settings["data"], "name": str(file), "columns": {"label": "topics"}}
    return Config.from_dict({**tiny_settings, "model": model, "data": data, **changes})


def test_a_text_with_several_classes_is_read_alike_from_lists_and_cells(tiny_settings, many_topics):
    left, right = (deal(sets_config(tiny_settings, many_topics / name)).corpus.train for name in ("lists.jsonl", "cells.csv"))
    assert left.label_names == right.label_names == ("money", "space", "sport")
    np.testing.assert_array_equal(left.label_sets, right.label_sets)
    assert (~left.label_sets.any(axis=1)).sum() == (left.labels == 3).sum() == 6
    config = sets_config(tiny_settings, many_topics / "cells.csv")
    header, rows, _ = partitions.table(deal(config).partition, deal(config).corpus.train)
    assert header[2:6] == ["money", "space", "sport", "none"]
    assert sum(int(row[5]) for row in rows) == 6


def test_texts_with_several_classes_are_learnt_by_both_engines(tiny_settings, many_topics, tmp_path):
    config = sets_config(tiny_settings, many_topics / "cells.csv")
    parts = assemble(config)
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    for left, right in zip(*(engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many)), strict=True):
        assert not right.fell_back
        for name in left.arrays:
            np.testing.assert_allclose(left.arrays[name], right.arrays[name], atol=1e-5, err_msg=name)
    settings = {
        **tiny_settings["training"],
        "max_steps": 20,
        "learning_rate": 3e-2,
        "head_init": "class_statistics",
    }  # which has no meaning for sets
    run = simulate(sets_config(tiny_settings, many_topics / "cells.csv", training=settings), tmp_path / "run")
    assert run.summary["primary_metric"] == "macro_f1"
    assert run.summary["metrics"]["loss"] < 0.8 * run.summary["initial"]["loss"]
    assert set(run.summary["metrics"]) == {"accuracy", "macro_f1", "micro_f1", "matthews", "loss"}


def test_the_loss_of_a_set_is_the_mean_over_its_classes():
    logits, labels = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.tensor(SETS, dtype=torch.float32)
    p = torch.sigmoid(logits)
    by_hand = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(dim=1)
    torch.testing.assert_close(classes.losses(logits, labels), by_hand)
    assert classes.metrics(logits.numpy(), labels.numpy())["loss"] == pytest.approx(float(by_hand.mean()), abs=1e-6)


def test_a_class_outside_the_set_is_named_with_its_row(tiny_settings, many_topics):
    settings = sets_config(tiny_settings, many_topics / "cells.csv").as_dict()
    config = Config.from_dict({**settings, "data": {**settings["data"], "labels": ["money", "space"]}})
    with pytest.raises(UserError, match=r"row 2 of the train rows has the label 'sport'; allowed: money, space"):
        deal(config)


def test_rows_that_hold_nothing_are_skipped_and_counted(tiny_settings, tmp_path):
    lines = ["text,label", *(f"text {number},{'ab'[number % 2]}" for number in range(40))]
    lines[7], lines[9] = ",a", "  ,b"
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    parts = assemble(Config.from_dict({**tiny_settings, "data": {"name": str(tmp_path / "rows.csv"), "max_length": 16}}))
    assert parts.notes[0] == 'rows that hold nothing were skipped: row 7 of the train rows has an empty "text", and 1 more'
    assert len(parts.split.corpus.train) + len(parts.split.corpus.test) == 38


def test_a_column_without_any_text_is_an_error(tiny_settings, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n,a\n,b\n")
    with pytest.raises(UserError, match="no row of the train rows has anything"):
        deal(Config.from_dict({**tiny_settings, "data": {"name": str(tmp_path / "rows.csv")}}))


def test_a_column_of_numbers_is_named_with_its_row(tiny_settings, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": 7 if n == 3 else "x", "label": n % 2}) for n in range(20)))
    with pytest.raises(UserError, match="row 4 of the train rows holds 7 where a text should be"):
        deal(Config.from_dict({**tiny_settings, "data": {"name": str(tmp_path / "rows.jsonl")}}))


def test_a_checkpoint_with_other_classes_gets_a_new_head(tiny_settings, tiny_bert, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=7).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
    parts = assemble(Config.from_dict({**tiny_settings, "model": {"name": str(tmp_path / "base")}}))
    assert parts.adapted.output_layer().out_features == 3
    again = assemble(Config.from_dict({**tiny_settings, "model": {"name": str(tmp_path / "base")}}))
    assert parts.adapted.base.fingerprint == again.adapted.base.fingerprint


def test_a_checkpoint_whose_body_has_another_shape_is_refused(tiny_settings, tiny_bert, tmp_path):
    import shutil

    shutil.copytree(tiny_bert, tmp_path / "base")
    facts = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**facts, "intermediate_size": 48}))
    with pytest.raises(UserError, match="has another shape than its config"):
        assemble(Config.from_dict({**tiny_settings, "model": {"name": str(tmp_path / "base")}}))


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_clients_json_says_what_each_holds_and_how_it_is_served(fraction, tiny_settings, tmp_path):
    settings = {**tiny_settings, "data": {**tiny_settings["data"], "validation_fraction": fraction}}
    config = Config.from_dict({**settings, "partition": {"name": "natural"}})
    run = simulate(config, tmp_path / "run")
    clients = json.loads((tmp_path / "run" / "clients.json").read_text())
    parts = assemble(config)
    counts = partitions.label_counts(parts.split.partition, parts.split.corpus.train)
    assert [sum(line["labels"].values()) for line in clients.values()] == [line["examples"] for line in clients.values()]
    assert [line["labels"].get("money", 0) for line in clients.values()] == counts[:, 0].tolist()
    for client, (name, line) in enumerate(clients.items()):
        if fraction:
            held = parts.worker.nodes[client].validation
        else:
            held = parts.test.take(np.array([row for row, owner in enumerate(parts.split.corpus.test.clients) if owner == name]))
        assert line["accuracy"] == pytest.approx(evaluate(parts.adapted, parts.task, run.arrays, held, 5)["accuracy"])
        assert line["measured_examples"] == len(held)
    said, values = run.summary["clients"], [line["accuracy"] for line in clients.values()]
    assert said["measured_on"] == ("validation" if fraction else "test")
    assert (said["worst"], said["variance"]) == (min(values), pytest.approx(np.var(values)))
    assert clients[said["worst_client"]]["accuracy"] == min(values)


def test_without_owners_the_clients_are_measured_on_their_own_examples_but_not_under_privacy(tiny_settings, tmp_path):
    run = simulate(Config.from_dict(tiny_settings), tmp_path / "run")
    assert run.summary["clients"]["measured_on"] == "train"
    private = {**tiny_settings, "privacy": {"noise_multiplier": 1.0}, "strategy": {"num_rounds": 1}}
    run = simulate(Config.from_dict(private), tmp_path / "private")
    assert run.summary["clients"] is None
    assert "accuracy" not in (tmp_path / "private" / "clients.json").read_text()


PAIRS = {"qnli": {"text": "question", "text_pair": "sentence"}, "rte": None}


def pair_columns(folder):
    import gzip

    with gzip.open(folder / "train.csv.gz", "rt") as file:
        header = file.readline().strip().split(",")
    return {"text": header[0], "text_pair": header[1]}


@pytest.mark.parametrize("name", PAIRS)
def test_real_pairs_keep_both_sides_when_they_are_cut(name, real_data, tiny_bert, tiny_settings):
    columns = pair_columns(real_data / name)
    data = {"name": str(real_data / name), "columns": columns, "max_length": 24, "max_examples": 200}
    config = Config.from_dict({**tiny_settings, "data": data})
    parts = assemble(config)
    tokenizer, train = parts.adapted.base.tokenizer, deal(config).corpus.train
    encoded = parts.task.encode(train, parts.adapted.base, config.data)
    assert encoded.truncated > 50
    for row, tokens in enumerate(encoded.inputs):
        first, second = (tokens["input_ids"][tokens["token_type_ids"] == side] for side in (0, 1))
        whole = [len(tokenizer(train.columns[role][row], add_special_tokens=False)["input_ids"]) for role in ("text", "text_pair")]
        kept = [len(first) - 2, len(second) - 1]
        assert len(tokens["input_ids"]) == min(24, sum(whole) + 3)
        assert min(kept) >= min(*whole, (24 - 3) // 2)  # the shorter side loses nothing before both are equal


def test_a_decoder_sees_where_a_pair_parts(real_data, tiny_settings):
    """Llama's tokenizer joins a pair without a mark; and the model was published without a pad token."""
    columns = pair_columns(real_data / "rte")
    data = {"name": str(real_data / "rte"), "columns": columns, "max_length": 256, "max_examples": 60}
    llama = {"name": str(real_data / "models" / "stories260k")}
    config = Config.from_dict({**tiny_settings, "model": llama, "data": data, "adapter": {"name": "lora", "r": 2}})
    parts = assemble(config)
    mine = parts.worker.nodes[0].train
    texts = [parts.adapted.base.tokenizer.decode(row["input_ids"]) for row in mine.inputs]
    marks = [text.count("<s>") + text.count("\n") for text in texts]
    assert min(marks) >= 2
    batched = evaluate(parts.adapted, parts.task, parts.adapted.read(), parts.test, 16)
    assert batched == pytest.approx(evaluate(parts.adapted, parts.task, parts.adapted.read(), parts.test, 1), abs=1e-5)


def test_a_real_pair_task_is_learnt(real_data, tmp_path):
    """RTE with MiniLM, shortened: the loss on what it trains on falls."""
    data = {"name": str(real_data / "rte"), "columns": pair_columns(real_data / "rte"), "max_length": 48, "max_examples": 40}
    training = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "head_init": "random"}
    settings = {"data": {**data, "test_fraction": 0.2}, "partition": {"name": "iid", "clients": 1}, "training": training}
    run = simulate(Config.from_dict({**settings, "strategy": {"num_rounds": 3}}), tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()][1:]
    assert losses[-1] < losses[0]
    assert {"accuracy", "macro_f1", "matthews", "loss"} <= set(run.summary["metrics"])
