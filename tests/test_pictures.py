"""Pictures: parquet and folders, domains, what cannot be decoded, engines that agree, and a reload by stock PEFT."""

import json

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError, simulate
from fedpeft.simulations.assemble import assemble, deal
from fedpeft.training import evaluate, many, one
from fedpeft.training.job import Job
from fedpeft.training.prefix import Prefix
from tests.conftest import COLOURS, pictures, png


def test_folders_are_read_as_parquet_is(tiny_picture_settings, tmp_path):
    """A folder a class, or a domain and then a class; beside each other, or below train and test."""
    for number, row in enumerate(pictures()):
        for place in (row["label"], f"{row['domain']}/{row['label']}"):
            flat = tmp_path / ("classes" if "/" not in place else "domains") / place / f"{number:03}.png"
            split = tmp_path / "split" / ("test" if number < 12 else "train") / row["domain"] / row["label"] / f"{number:03}.png"
            for file in (flat, split):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(row["image"]["bytes"])
    for folder, domains, tested in (("classes", None, 12), ("domains", {"dark", "light"}, 12), ("split", {"dark", "light"}, 12)):
        config = Config.from_dict({**tiny_picture_settings, "partition": {"name": "iid", "clients": 2}})
        config = Config.from_dict({**config.as_dict(), "data": {"name": str(tmp_path / folder), "test_fraction": 0.25}})
        found = deal(config).corpus
        assert (len(found.train), len(found.test), found.train.label_names) == (36, tested, ("blue", "green", "red"))
        assert (None if found.train.domains is None else set(found.train.domains)) == domains
        assert {str(path).split("/")[-2] for path in found.train.columns["image"]} == set(COLOURS)
    parts = assemble(Config.from_dict({**tiny_picture_settings, "data": {"name": str(tmp_path / "split")}}))
    whole = assemble(Config.from_dict(tiny_picture_settings))
    seen = {row["pixel_values"].tobytes() for part in (parts, whole) for row in part.test.inputs + part.worker.nodes[0].train.inputs}
    everything = [row for node in whole.worker.nodes.values() for row in node.train.inputs] + whole.test.inputs
    assert seen <= {row["pixel_values"].tobytes() for row in everything}


def test_pictures_that_do_not_lie_alike_are_refused(tiny_picture_settings, tmp_path):
    for place in ("a/x.png", "a/b/y.png"):
        (tmp_path / "folder" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / place).write_bytes(png((1, 2, 3), 0))
    with pytest.raises(UserError, match="do not lie alike"):
        deal(Config.from_dict({**tiny_picture_settings, "data": {"name": str(tmp_path / "folder")}}))


def test_a_broken_picture_is_skipped_and_counted_and_all_broken_are_an_error(tiny_picture_settings, tmp_path):
    import datasets

    rows = pictures()
    rows[5]["image"]["bytes"] = b"\x89PNG\r\n but no more"
    rows[6]["image"]["bytes"] = rows[6]["image"]["bytes"][:60]
    plain = datasets.Features(
        {
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": datasets.Value("string"),
            "domain": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=plain).to_parquet(tmp_path / "some.parquet")
    parts = assemble(Config.from_dict({**tiny_picture_settings, "data": {"name": str(tmp_path / "some.parquet"), "test_fraction": 0.25}}))
    assert sum("cannot be read as a picture" in note for note in parts.notes) >= 1
    assert sum(len(node.train) for node in parts.worker.nodes.values()) + len(parts.test) == 46
    for row in rows:
        row["image"]["bytes"] = b"nothing"
    datasets.Dataset.from_list(rows, features=plain).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"no example of .* can be used: row \d+: cannot be read as a picture"):
        assemble(Config.from_dict({**tiny_picture_settings, "data": {"name": str(tmp_path / "none.parquet")}}))


def test_a_cell_that_is_no_picture_is_named_with_its_row(tiny_picture_settings, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": 3, "label": n % 2, "domain": "a"}) for n in range(9)))
    with pytest.raises(UserError, match="row 1 of the train rows holds a int where a picture should be"):
        deal(Config.from_dict({**tiny_picture_settings, "data": {"name": str(tmp_path / "rows.jsonl")}}))


def test_domains_are_clients_and_one_may_be_split_further(tiny_picture_settings):
    for clients, further, groups in ((2, None, [{"dark"}, {"light"}]), (4, {"light": 3}, [{"dark"}, *[{"light"}] * 3])):
        split = deal(Config.from_dict({**tiny_picture_settings, "partition": {"name": "domain", "clients": clients, "split": further}}))
        domains = split.corpus.train.domains
        assert [{domains[row] for row in rows} for rows in split.partition.indices] == groups
    for further, says in (({"grey": 2}, "there is no domain grey; allowed: dark, light"), ({"dark": 2}, "2 clients.* comes to 3")):
        with pytest.raises(UserError, match=says):
            deal(Config.from_dict({**tiny_picture_settings, "partition": {"name": "domain", "clients": 2, "split": further}}))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_many_clients_train_in_one_pass_as_one_by_one(dropout, tiny_picture_settings):
    adapter = {**tiny_picture_settings["adapter"], "lora_dropout": dropout}
    training = {**tiny_picture_settings["training"], "optimizer": "sgd", "learning_rate": 0.1}
    parts = assemble(config := Config.from_dict({**tiny_picture_settings, "adapter": adapter, "training": training}))
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    for left, right in zip(*(engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many)), strict=True):
        assert not right.fell_back
        for name in left.arrays:
            np.testing.assert_allclose(left.arrays[name], right.arrays[name], atol=1e-5, err_msg=name)


def test_states_kept_of_the_frozen_layers_change_nothing(tiny_picture_settings):
    adapter = {"name": "lora", "r": 4, "target_modules": r".*\.1\..*(query|value|q_proj|v_proj)"}
    training = {**tiny_picture_settings["training"], "optimizer": "sgd", "learning_rate": 0.1, "prefix_cache": "memory"}
    model = {**tiny_picture_settings["model"], "dropout": False}
    parts = assemble(config := Config.from_dict({**tiny_picture_settings, "model": model, "adapter": adapter, "training": training}))
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    ended = many.train(parts.adapted, parts.task, config, jobs)
    assert parts.adapted.prefix._store._kept
    parts.adapted.prefix = Prefix(parts.adapted)
    for left, right in zip(ended, one.train(parts.adapted, parts.task, config, jobs), strict=True):
        assert not left.fell_back
        for name in left.arrays:
            np.testing.assert_allclose(left.arrays[name], right.arrays[name], atol=1e-5, err_msg=name)


def test_colours_are_learnt_and_peft_reloads_what_was_federated(tiny_picture_settings, tiny_vit, pictures_parquet, tmp_path):
    from peft import PeftModel
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    config = Config.from_dict(tiny_picture_settings)
    run, parts = simulate(config, tmp_path / "run"), assemble(config)
    assert run.summary["metrics"]["accuracy"] == 1.0
    parts.adapted.write(run.arrays)
    ours = evaluate.logits(parts.adapted, parts.test, 5)
    torch.manual_seed(999)  # whatever the folder does not hold is drawn anew here, and differs
    base = AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=3, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(base, run.adapter_dir).eval()
    pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in parts.test.inputs]))
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(pixel_values=pixels).logits.numpy(), atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(run.adapter_dir, backend="pil")
    from fedpeft.data.pictures import opened

    again = processor(opened(parts.split.corpus.test.columns["image"][0]), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(again, parts.test.inputs[0]["pixel_values"])


def test_real_domains_of_pictures(real_data, tmp_path, tiny_vit):
    data = {"name": str(real_data / "pacs_2k"), "columns": {"domain": "client_id", "client": "client_id"}, "max_examples": 120}
    settings = {
        "model": {"name": str(tiny_vit), "task": "image-classification"},
        "data": data,
        "partition": {"name": "domain", "clients": 4},
    }
    adapter, training = {"name": "lora", "target_modules": ["q_proj", "v_proj"]}, {"max_steps": 1}
    run = simulate(
        Config.from_dict({**settings, "adapter": adapter, "training": training, "strategy": {"num_rounds": 1}}), tmp_path / "run"
    )
    assert run.summary["labels"] == ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    assert run.summary["clients"]["measured_on"] in ("test", "train")
