"""`fedpeft export`: what is given away is the run's own model, and nothing is written where something is wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedpeft import Config, UserError, simulate
from fedpeft.cli import main
from fedpeft.server.export import export
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate


@pytest.fixture
def run(tiny_settings, tmp_path):
    return simulate(Config.from_dict(tiny_settings), tmp_path / "run")


def outputs(settings, folder, kind):
    """Of the test part, from the merged model in `folder`."""
    parts = assemble(Config.from_dict(settings))
    parts.adapted.model = kind.from_pretrained(folder).eval()
    return evaluate.logits(parts.adapted, parts.test, 7)


def own(settings, arrays):
    parts = assemble(Config.from_dict(settings))
    parts.adapted.write(arrays)
    return evaluate.logits(parts.adapted, parts.test, 7)


def test_the_merged_model_needs_no_peft_and_knows_its_classes(run, tiny_settings, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "whole"), "--merge"]) == 0
    assert "BertForSequenceClassification with the adapter merged in, float32" in capsys.readouterr().out
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    merged = outputs(tiny_settings, tmp_path / "whole", AutoModelForSequenceClassification)
    np.testing.assert_allclose(merged, own(tiny_settings, run.arrays), atol=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    said = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "whole"))("the team won")
    assert said[0]["label"] in {"money", "space", "sport"}
    assert model.config.hidden_dropout_prob == 0.1
    assert [place.name for place in tmp_path.iterdir() if place.name.startswith(".")] == []


def test_a_language_model_is_merged_over_the_base_that_the_run_had(tiny_lm_settings, tmp_path):
    """In bfloat16 the base is rounded: the run's model is the rounded base and the adapter, in float32."""
    from transformers import AutoModelForCausalLM

    simulate(Config.from_dict({**tiny_lm_settings, "model": {**tiny_lm_settings["model"], "dtype": "bfloat16"}}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "whole", None, merge=True, dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_lm_settings["model"]["name"], dtype=torch.bfloat16).float().state_dict()
    factors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    scaling = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    for name, weight in base.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in factors:
            step = factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"] * scaling["lora_alpha"] / scaling["r"]
            assert step.abs().max() > 0
            weight = weight + step
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)


def test_an_embedding_that_is_also_the_output_layer_is_merged_alone(tiny_lm_settings, tmp_path):
    """Tied weights: the adapter changes what is read, not what is written."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = tiny_lm_settings["model"]["name"]
    config = LlamaConfig.from_pretrained(place, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(place).save_pretrained(tmp_path / "base")
    settings = {**tiny_lm_settings, "model": {**tiny_lm_settings["model"], "name": str(tmp_path / "base"), "samples": 0}}
    settings["adapter"] = {"name": "lora", "r": 4, "target_modules": ["embed_tokens", "q_proj"]}
    run = simulate(Config.from_dict({**settings, "training": {**settings["training"], "learning_rate": 0.05}}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "whole", None, merge=True, dtype="float32")
    parts = assemble(Config.from_dict(settings))
    parts.adapted.model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    found = parts.task.measure(evaluate.of_every_record(parts.adapted, parts.test, 7, parts.task.outputs), parts.test.labels)
    assert found["loss"] == pytest.approx(run.summary["metrics"]["loss"], rel=1e-4)


def test_half_precision_is_written_when_asked_for(run, tmp_path):
    export(tmp_path / "run", tmp_path / "whole", None, merge=True, dtype="bfloat16")
    assert {value.dtype for value in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.bfloat16}


def test_without_merge_the_adapter_is_given_as_it_is(run, tmp_path, capsys):
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "given")]) == 0
    assert "LORA for " in (said := capsys.readouterr().out) and said.endswith("of rank 4\n")
    for file in (tmp_path / "run" / "adapter").iterdir():
        assert (tmp_path / "given" / file.name).read_bytes() == file.read_bytes()


def test_an_adapter_of_higher_rank_is_said_to_be_one(tiny_settings, tmp_path):
    simulate(Config.from_dict({**tiny_settings, "strategy": {"name": "flora", "num_rounds": 1}}), tmp_path / "run")
    said = export(tmp_path / "run", tmp_path / "given", None, merge=False, dtype="float32")
    assert "trained with 4: what went into the backbone is part of it, exactly" in said


def test_an_adapter_of_clients_with_ranks_of_their_own_is_given_too(tiny_settings, tmp_path):
    adapter = {**tiny_settings["adapter"], "r": [2, 4]}
    simulate(Config.from_dict({**tiny_settings, "adapter": adapter, "strategy": {"name": "flex_lora", "num_rounds": 1}}), tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "given", None, merge=False, dtype="float32").endswith("of rank 4")


def test_a_clients_own_model_is_exported_by_its_name(tiny_settings, tmp_path):
    from transformers import AutoModelForSequenceClassification

    simulate(Config.from_dict({**tiny_settings, "strategy": {"name": "fedsa_lora", "num_rounds": 2}}), tmp_path / "run")
    first, second = sorted(place.name for place in (tmp_path / "run" / "personal").iterdir())[:2]
    for name in (first, second):
        export(tmp_path / "run", tmp_path / f"whole-{name}", name, merge=True, dtype="float32")
    each = [outputs(tiny_settings, tmp_path / f"whole-{name}", AutoModelForSequenceClassification) for name in (first, second)]
    assert np.abs(each[0] - each[1]).max() > 1e-6
    with pytest.raises(UserError, match=rf"^--client: there is no adapter in .*nobody; allowed: clients: {first}, {second}"):
        export(tmp_path / "run", tmp_path / "none", "nobody", merge=False, dtype="float32")


def full(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "mine.txt").write_text("mine")


def not_a_number(tmp_path):
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)


def unfinished(tmp_path):
    (tmp_path / "run" / "summary.json").unlink()


def quantised(tmp_path):
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("quantization: null", "quantization: 4bit"))


def other_base(tmp_path):
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(Config.load(config).model.name), "minilm"))


BAD = {
    full: "^--to: .*whole is there and not empty; name another folder$",
    not_a_number: "^--merge: PEFT refuses: NaNs detected",
    unfinished: "summary.json",
    quantised: "^--merge: the run's base was quantised .*export without --merge$",
    other_base: "^model.name: the base is another than the run's .fingerprint",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_what_is_wrong_is_one_line_and_writes_nothing(spoil, run, tmp_path, capsys):
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=BAD[spoil]) as caught:
        export(tmp_path / "run", tmp_path / "whole", None, merge=True, dtype="float32")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "whole"), "--merge"]) == 2
