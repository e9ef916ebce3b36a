"""Causal language models: which tokens train, what their loss is, rows that share, padding on both sides, and what is said."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError, simulate
from fedpeft.cli import main
from fedpeft.data.encoded import UNTRAINED
from fedpeft.simulations.assemble import assemble
from fedpeft.tasks import generation, packing
from fedpeft.training import many, one
from fedpeft.training.evaluate import evaluate, of_every_record
from fedpeft.training.job import Job


def changed(settings, **sections):
    return {**settings, **{name: {**settings.get(name, {}), **values} for name, values in sections.items()}}


def parts_of(settings, **sections):
    return assemble(Config.from_dict(changed(settings, **sections)))


def written(tmp_path, rows):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "rows.jsonl")


def turn(role, content):
    return {"role": role, "content": content}


# What the model reads, in pieces that train or do not. A token is a letter; <s> is one token and > here, </s> is one and < here.
MASKS = {
    "plain": ([turn("user", "ab"), turn("assistant", "cd")], [(">ab\n", False), ("cd<", True)]),
    "instruction": (
        [turn("user", "ab"), turn("assistant", "cd")],
        [(">### Instruction:\nab\n\n### Response:\n", False), ("cd<", True)],
    ),
    "dialogue": (
        [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")],
        [(">User: a\nAssistant: ", False), ("b<\n", True), ("User: c\nAssistant: ", False), ("d<\n", True)],
    ),
}


@pytest.mark.parametrize("template", MASKS)
def test_what_trains_is_what_a_hand_has_marked_token_by_token(template, tiny_lm_settings, tmp_path):
    said, pieces = MASKS[template]
    rows = [{"messages": said, "category": kind} for kind in ("a", "b") for _ in range(5)]
    data = {"name": written(tmp_path, rows), "columns": {"messages": "messages", "client": "category"}, "max_length": 64}
    parts = parts_of(tiny_lm_settings, model={"chat_template": template}, data=data)
    mine, tokenizer = parts.worker.nodes[0].train, parts.adapted.base.tokenizer
    ids = mine.inputs[0]["input_ids"]
    letters = [{"<s>": ">", "</s>": "<"}.get(token, token) for token in (tokenizer.decode([one]) for one in ids)]
    assert letters == [letter for piece, _ in pieces for letter in piece]
    trains = [trained for piece, trained in pieces for _ in piece]
    assert mine.labels[0].tolist() == [code if trained else UNTRAINED for code, trained in zip(ids, trains, strict=True)]


def test_the_context_stands_below_the_prompt_and_the_system_above(tiny_lm_settings, tmp_path):
    rows = [{"prompt": "ab", "context": "xy", "completion": "cd", "category": "a"}] * 10
    data = {"name": written(tmp_path, rows), "columns": {"context": "context", "client": "category"}}
    parts = parts_of(tiny_lm_settings, model={"system": "s"}, data=data)
    assert parts.adapted.base.tokenizer.decode(parts.test.inputs[0]["input_ids"]) == "<s>s\nab\n\nxy\ncd</s>"


def test_plain_text_trains_whole_but_for_its_first_token(tiny_lm_settings, tmp_path):
    rows = [{"speech": "ab", "category": "a"}] * 10
    data = {"name": written(tmp_path, rows), "columns": {"prompt": None, "completion": "speech", "client": "category"}}
    parts = parts_of(tiny_lm_settings, model={"chat_template": None}, data=data)
    tokenizer, labels = parts.adapted.base.tokenizer, parts.test.labels[0]
    assert labels[0] == UNTRAINED
    assert tokenizer.decode(labels[1:]) == "ab</s>"


def test_the_tokenizer_s_own_template_is_used_where_none_is_named(tiny_lm_settings, tiny_llama, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(tiny_llama, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ '[' + turn.role + ']' + turn.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    parts = parts_of(tiny_lm_settings, model={"name": str(tmp_path / "base"), "chat_template": None}, data={"max_length": 64})
    text, labels = parts.adapted.base.tokenizer.decode(parts.test.inputs[0]["input_ids"]), parts.test.labels[0]
    assert text.startswith("[user]")
    assert parts.adapted.base.tokenizer.decode(labels[labels != UNTRAINED]) == text.partition("[assistant]")[2]


def test_the_loss_of_a_record_is_transformers_own_for_it_alone(tiny_lm_settings):
    """With records of different lengths in one batch, and the metrics over all of their tokens."""
    parts = parts_of(tiny_lm_settings)
    base, mine = parts.adapted.base, parts.worker.nodes[0].train
    inputs, labels = mine.batch(np.arange(7), base.tokenizer, "cpu")
    with torch.no_grad():
        ours = parts.task.losses(parts.adapted.model, inputs, labels)
        theirs = [
            parts.adapted.model(
                input_ids=torch.from_numpy(mine.inputs[row]["input_ids"])[None], labels=torch.from_numpy(mine.labels[row])[None]
            ).loss
            for row in range(7)
        ]
    assert len({len(mine.inputs[row]["input_ids"]) for row in range(7)}) > 1
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-5)
    tokens = np.array([(mine.labels[row] != UNTRAINED).sum() for row in range(7)])
    metrics = evaluate(parts.adapted, parts.task, parts.adapted.read(), mine.take(np.arange(7)), 3)
    assert metrics["loss"] == pytest.approx(float((np.array([float(loss) for loss in theirs]) * tokens).sum() / tokens.sum()), abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))


def decoder(kind, tiny_llama, folder):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    vocabulary, ends = len(tokenizer), {"bos_token_id": 0, "eos_token_id": 1}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, **ends))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, max_position_embeddings=128, **small, **ends))
        for parameter in model.parameters():  # sure of itself, so that a leak would show
            parameter.data.mul_(4 if parameter.ndim > 1 else 1)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_packed_records_do_not_see_each_other(kind, tiny_lm_settings, tiny_llama, tmp_path):
    """Loss and hits of every packed row are the sums of those of its records alone; no record is lost or met twice."""
    base = str(tiny_llama) if kind == "llama" else decoder(kind, tiny_llama, tmp_path / "base")
    parts = parts_of(tiny_lm_settings, model={"name": base, "packing": True}, data={"max_length": 40})
    alone = parts_of(tiny_lm_settings, model={"name": base}, data={"max_length": 40})
    ask = parts.task.outputs
    for node, other in zip(parts.worker.nodes.values(), alone.worker.nodes.values(), strict=True):
        together = of_every_record(parts.adapted, node.train, 3, ask)
        apiece = of_every_record(parts.adapted, other.train, 1, ask)
        assert len(node.train) < len(other.train) / 2
        assert max(len(row["input_ids"]) for row in node.train.inputs) <= 40
        np.testing.assert_allclose(together.sum(axis=0), apiece.sum(axis=0), rtol=1e-5)
        taken = []
        for row, found in zip(node.train.inputs, together, strict=True):
            pieces = [row["input_ids"][row["record_ids"] == number].tolist() for number in range(1, row["record_ids"].max() + 1)]
            places = [next(p for p, one in enumerate(other.train.inputs) if one["input_ids"].tolist() == piece) for piece in pieces]
            np.testing.assert_allclose(found, apiece[places].sum(axis=0), rtol=1e-4)
            taken += [tuple(piece) for piece in pieces]
        assert sorted(taken) == sorted(tuple(one["input_ids"].tolist()) for one in other.train.inputs)


def test_a_model_whose_records_meet_in_a_row_is_refused(tiny_lm_settings, monkeypatch):
    """Planted: the mask that keeps them apart is left away."""
    whole = packing.apart
    monkeypatch.setattr(packing, "apart", lambda model, inputs: {n: v for n, v in whole(model, inputs).items() if n != "attention_mask"})
    with pytest.raises(UserError, match="records of one row see each other"):
        parts_of(tiny_lm_settings, model={"packing": True, "name": tiny_lm_settings["model"]["name"]})


@pytest.mark.parametrize(("longest", "right"), [(8, True), (24, False)])
def test_records_beyond_a_window_of_the_models_attention_are_not_packed(longest, right, tiny_lm_settings, tiny_llama, tmp_path):
    """The mask that keeps records apart takes the place of the window: alone a record is read otherwise."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = MistralConfig(vocab_size=len(tokenizer), sliding_window=8, bos_token_id=0, eos_token_id=1, **small)
        MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ours = {"model": {"packing": True, "name": str(tmp_path / "base")}, "data": {"max_length": longest}}
    if right:
        assert parts_of(tiny_lm_settings, **ours)
    else:
        with pytest.raises(UserError, match=r"model.packing: .* a window of 8, data.max_length is 24"):
            parts_of(tiny_lm_settings, **ours)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_completion_does_not_depend_on_batch_mates(kind, tiny_lm_settings, tiny_llama, tmp_path):
    """Prompts are padded on the left, where positions must not count the padding."""
    base = str(tiny_llama) if kind == "llama" else decoder(kind, tiny_llama, tmp_path / "base")
    parts = parts_of(tiny_lm_settings, model={"name": base})
    prompts = [[5], [9, 8, 7, 6, 5, 4], [40, 50, 60]]
    together = generation._complete(parts.adapted, prompts, 12)
    assert together == [generation._complete(parts.adapted, [prompt], 12)[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_engines_agree_on_packed_rows_too(tiny_lm_settings):
    for packed in (False, True):
        settings = changed(tiny_lm_settings, model={"packing": packed}, training={"optimizer": "sgd", "learning_rate": 0.1})
        parts = assemble(config := Config.from_dict(settings))
        jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
        for left, right in zip(*(engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many)), strict=True):
            assert not right.fell_back
            assert left.loss == pytest.approx(right.loss, abs=1e-5)
            for name in left.arrays:
                np.testing.assert_allclose(left.arrays[name], right.arrays[name], atol=1e-5, err_msg=name)


def test_a_run_says_something_before_and_after_and_is_scored(tiny_lm_settings, tmp_path):
    (tmp_path / "own.py").write_text("def length(generated, reference):\n    return len(generated) / 100\n")
    scorers = ["exact_match", "rouge_l", f"{tmp_path / 'own.py'}:length"]
    config = Config.from_dict(
        changed(tiny_lm_settings, model={"scorers": scorers, "samples": 3}, training={"max_steps": 20, "learning_rate": 3e-2})
    )
    run = simulate(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["before"] * 3 + ["after"] * 3
    for left, right in zip(lines[:3], lines[3:], strict=True):
        assert (left["prompt"], left["reference"]) == (right["prompt"], right["reference"])
        assert left["prompt"].startswith("<s>") and left["prompt"].endswith("\n")
        assert left["generated"] != right["generated"]
        assert right[scorers[2]] == len(right["generated"]) / 100
    assert set(run.summary["samples"]["after"]) == set(scorers)
    assert run.summary["metrics"]["perplexity"] < 0.9 * run.summary["initial"]["perplexity"]
    assert run.summary["best"]["perplexity"] == min(run.summary["metrics"]["perplexity"], run.summary["best"]["perplexity"])
    simulate(config, tmp_path / "run", resume=True)
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 6


def test_peft_reloads_what_was_federated(tiny_lm_settings, tiny_llama, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = Config.from_dict(tiny_lm_settings)
    run, parts = simulate(config, tmp_path / "run"), assemble(config)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), run.adapter_dir).eval()
    with torch.no_grad():
        sums = [
            parts.task.outputs(model, *parts.test.batch(np.array([row]), parts.adapted.base.tokenizer, "cpu"))[0]
            for row in range(len(parts.test))
        ]
    assert parts.task.measure(torch.stack(sums).numpy(), parts.test.labels)["perplexity"] == pytest.approx(
        run.summary["metrics"]["perplexity"]
    )


def test_scorers_by_hand():
    assert generation.exact_match(" The  Cat", "the cat") == 1.0
    assert generation.exact_match("the cat", "a cat") == 0.0
    assert generation.final_number("so 3 + 4 = 7,000.", "it is\n#### 7000") == 1.0
    assert generation.final_number("no idea", "#### 7") == 0.0
    assert generation.rouge_l("the cat sat", "the cat sat on the mat") == pytest.approx(2 / 3)


GOOD = [{"prompt": f"{n}", "completion": "yes", "category": "ab"[n % 2]} for n in range(40)]


def test_single_bad_rows_are_skipped_and_counted(tiny_lm_settings, tmp_path):
    rows = [dict(row) for row in GOOD]
    rows[3]["completion"], rows[8]["prompt"] = "  ", "x" * 60
    parts = parts_of(tiny_lm_settings, data={"name": written(tmp_path, rows)})
    assert parts.notes[0] == 'rows that hold nothing were skipped: row 4 of the train rows has an empty "completion"'
    assert "examples were skipped: row 9: 66 tokens, and all that trains is beyond data.max_length=24" in "\n".join(parts.notes)
    assert sum(len(node.train) for node in parts.worker.nodes.values()) + len(parts.test) == 38


MISTAKES = {
    "no template": (
        GOOD,
        {"model": {"chat_template": None}},
        "the tokenizer has no chat template, and the config names none; allowed: plain",
    ),
    "a template that nobody knows": (GOOD, {"model": {"chat_template": "plane"}}, 'did you mean "plain"?'),
    "nothing left to learn": (GOOD, {"data": {"max_length": 2}}, "no example of"),
    "every completion empty": ([{**row, "completion": ""} for row in GOOD], {}, 'no row of the train rows has anything in "completion"'),
    "a completion that is no text": (
        [{**row, "completion": 7} for row in GOOD],
        {},
        "row 1 of the train rows holds 7 where a text should be",
    ),
    "no such column": (GOOD, {"data": {"columns": {"completion": "answer"}}}, 'no column "answer"; allowed: category, completion, prompt'),
    "a conversation without an end": (
        [{"talk": [{"role": "user", "content": "a"}]}] * 9,
        {"data": {"columns": {"messages": "talk"}}},
        "row 1 of the train rows holds a conversation that does not end with the assistant",
    ),
    "no conversation": ([{"talk": "a"}] * 9, {"data": {"columns": {"messages": "talk"}}}, "holds no conversation"),
    "packing under privacy": (GOOD, {"model": {"packing": True}, "privacy": {"noise_multiplier": 1.0}}, "cannot be clipped alone"),
    "quantisation without a GPU": (GOOD, {"model": {"quantization": "4bit"}}, "needs a CUDA GPU"),
    "a scorer that nobody knows": (GOOD, {"model": {"scorers": ["rouge"]}}, "rouge_l"),
    "Dirichlet without labels": (GOOD, {"partition": {"name": "dirichlet", "clients": 2, "alpha": 1.0}}, "data.columns.label"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name, tiny_lm_settings, tmp_path, capsys):
    import yaml

    if "quantisation" in name and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    rows, sections, says = MISTAKES[name]
    columns = sections.get("data", {}).get("columns", {"client": "category"})
    settings = changed(tiny_lm_settings, **{**sections, "data": {**sections.get("data", {}), "name": written(tmp_path, rows)}})
    settings["data"]["columns"] = columns
    if "partition" in sections or "client" not in columns:
        settings["partition"] = sections.get("partition", {"name": "iid", "clients": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["simulate", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fedpeft: ")]
    assert len(lines) == 1, lines
    assert says in lines[0]


def test_a_template_that_rewrites_what_was_said_is_refused(tiny_lm_settings, tiny_llama, tmp_path):
    (tmp_path / "own.py").write_text(
        'def last_only():\n    return "{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}"\n'
    )
    with pytest.raises(UserError, match="what the assistant says cannot be told apart"):
        parts_of(tiny_lm_settings, model={"chat_template": f"{tmp_path / 'own.py'}:last_only"})


def test_a_tokenizer_that_cannot_pad_is_refused(tiny_lm_settings, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "base")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / "base" / file).is_file():
            facts = json.loads((tmp_path / "base" / file).read_text())
            (tmp_path / "base" / file).write_text(json.dumps({key: value for key, value in facts.items() if key != "eos_token"}))
    with pytest.raises(UserError, match="no token to pad with, and no end token"):
        parts_of(tiny_lm_settings, model={"name": str(tmp_path / "base")})


def test_a_real_model_learns_real_instructions(real_data, tmp_path):
    """Dolly by category with karpathy's stories260K, shortened."""
    settings = {
        "model": {"name": str(real_data / "models" / "stories260k"), "task": "causal-lm", "chat_template": "plain", "samples": 2},
        "data": {
            "name": str(real_data / "dolly15k"),
            "columns": {"prompt": "instruction", "context": "input", "completion": "output", "client": "category"},
            "max_length": 256,
            "max_examples": 300,
        },
        "adapter": {"name": "lora", "r": 8, "target_modules": "all-linear"},
        "strategy": {"num_rounds": 2},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "engine": "many"},
    }
    run = simulate(Config.from_dict(settings), tmp_path / "run")
    assert run.summary["metrics"]["perplexity"] < 0.8 * run.summary["initial"]["perplexity"]
    assert json.loads((tmp_path / "run" / "clients.json").read_text())["open_qa"]["measured_on"] == "test"


def test_examples_can_be_looked_at_before_anything_is_trained(tiny_lm_settings, tmp_path, capsys):
    """Decoded, the trained tokens marked, the padding said; nothing of the model but its tokenizer is read."""
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tiny_lm_settings, "seed": 3}))
    assert main(["partition", str(tmp_path / "config.yaml"), "--examples", "40"]) == 0
    said = capsys.readouterr().out.splitlines()
    lines = [(line, said[place + 1]) for place, line in enumerate(said) if line.startswith("client minus, row")]
    assert len(lines) > 20
    longest = "11 tokens, 6 of them train, no padding"
    assert any(facts.endswith(longest) and text.strip() == r"'<s>0-2\n⟦is -2</s>⟧'" for facts, text in lines)
    assert any(facts.endswith("10 tokens, 5 of them train, 1 of padding on the right") for facts, _ in lines)


def test_samples_may_hold_any_separator_of_lines(tmp_path):
    """Web text has U+2028; a file of samples that could not be read again would end the run after its training."""
    from types import SimpleNamespace

    from fedpeft.server import samples
    from fedpeft.server.run_folder import RunFolder

    task = SimpleNamespace(show=lambda *given: [{"prompt": "a\u2028b\u0085c", "said": "d\u2029", "score": 1.0}])
    for when in ("before", "after", "after"):
        samples.keep(RunFolder(tmp_path), task, SimpleNamespace(write=lambda arrays: None), when, {}, None, None)
    assert samples.scores(RunFolder(tmp_path)) == {"samples": {"before": {"score": 1.0}, "after": {"score": 1.0}}}
