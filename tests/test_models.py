"""Any Hugging Face classifier: the adapter folder holds everything that training moved or the seed drew."""

import warnings

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError, simulate
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}


def bert(vocabulary):
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=vocabulary, **SMALL))


def bert_without_pooler(vocabulary):
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=vocabulary, **SMALL), add_pooling_layer=False)


def roberta(vocabulary):
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(vocab_size=vocabulary, **SMALL))


def distilbert(vocabulary):
    from transformers import DistilBertConfig, DistilBertModel

    return DistilBertModel(
        DistilBertConfig(vocab_size=vocabulary, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)
    )


def deberta(vocabulary):
    from transformers import DebertaV2Config, DebertaV2Model

    return DebertaV2Model(DebertaV2Config(vocab_size=vocabulary, pooler_hidden_size=32, **SMALL))


def modernbert(vocabulary):
    from transformers import ModernBertConfig, ModernBertModel

    return ModernBertModel(ModernBertConfig(vocab_size=vocabulary, pad_token_id=0, **SMALL))


def bart(vocabulary):
    from transformers import BartConfig, BartModel

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ends = {"eos_token_id": 102, "pad_token_id": 0, "bos_token_id": 101, "decoder_start_token_id": 102}
    return BartModel(BartConfig(vocab_size=vocabulary, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **sizes, **ends))


def gpt2(vocabulary):
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def llama(vocabulary):
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **SMALL))


def qwen2(vocabulary):
    from transformers import Qwen2Config, Qwen2Model

    return Qwen2Model(Qwen2Config(vocab_size=vocabulary, num_key_value_heads=2, **SMALL))


def gemma(vocabulary):
    from transformers import GemmaConfig, GemmaModel

    return GemmaModel(GemmaConfig(vocab_size=vocabulary, num_key_value_heads=2, head_dim=8, **SMALL))


MODELS = [bert, bert_without_pooler, roberta, distilbert, deberta, modernbert, bart, gpt2, llama]

TARGETS = {distilbert: ["q_lin", "v_lin"]}  # its pre_classifier is a head, and PEFT will not put LoRA on what it saves whole


def saved(make, tiny_bert, folder):
    """Save a model of random weights with the tokenizer of `tiny_bert`, which comes back."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        make(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("head_init", ["random", "class_statistics"])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_peft_reloads_what_was_federated(make, head_init, tiny_settings, tiny_bert, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = saved(make, tiny_bert, tmp_path / "base")
    training = {**tiny_settings["training"], "head_init": head_init, "learning_rate": 1e-3}
    settings = {**tiny_settings, "training": training, "model": {"name": str(tmp_path / "base")}, "strategy": {"num_rounds": 1}}
    targets = TARGETS.get(make, "all-linear")
    config = Config.from_dict({**settings, "adapter": {"name": "lora", "r": 4, "target_modules": targets}})
    run = simulate(config, tmp_path / "run")
    assert run.summary["rejected_updates"] == 0
    parts = assemble(config)
    parts.adapted.write(run.arrays)
    ours = evaluate.logits(parts.adapted, parts.test, 7)

    torch.manual_seed(999)  # whatever the folder does not hold is drawn anew here, and differs
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, run.adapter_dir).eval()
    tokens = AutoTokenizer.from_pretrained(run.adapter_dir)
    with torch.no_grad():
        theirs = [
            model(**tokens(text, truncation=True, max_length=16, return_tensors="pt")).logits[0].numpy()
            for text in parts.split.corpus.test.columns["text"]
        ]
    np.testing.assert_allclose(ours, np.stack(theirs), atol=1e-5 * max(1.0, float(np.abs(ours).max())))


def test_logits_do_not_depend_on_batch_mates(tiny_settings, tiny_bert, tmp_path):
    """Also for a decoder whose tokenizer pads on the left by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, padding_side="left")
    with torch.random.fork_rng():
        gpt2(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    parts = assemble(Config.from_dict({**tiny_settings, "model": {"name": str(tmp_path / "base")}, "adapter": {"name": "lora"}}))
    alone = np.concatenate([evaluate.logits(parts.adapted, parts.test.take(np.array([row])), 1) for row in range(len(parts.test))])
    np.testing.assert_allclose(evaluate.logits(parts.adapted, parts.test, 24), alone, atol=1e-5)


@pytest.mark.parametrize("make", [*MODELS, qwen2, gemma], ids=lambda make: make.__name__)
def test_many_clients_train_in_one_pass_as_one_by_one(make, tiny_settings, tiny_bert, tmp_path, caplog):
    """With the dropouts of the model's own config, one on the adapter's input, and every linear layer adapted."""

    from fedpeft.training import many, one
    from fedpeft.training.job import Job

    many._say.cache_clear()
    saved(make, tiny_bert, tmp_path / "base")
    adapter = {"name": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": TARGETS.get(make, "all-linear")}
    training = {**tiny_settings["training"], "optimizer": "sgd", "learning_rate": 0.1, "max_steps": 3}
    parts = assemble(
        config := Config.from_dict({**tiny_settings, "model": {"name": str(tmp_path / "base")}, "adapter": adapter, "training": training})
    )
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    left, right = (engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many))
    assert not [record for record in caplog.records if record.name == many.__name__]
    for mine, theirs, job in zip(right, left, jobs, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert max(np.abs(theirs.arrays[name] - job.start[name]).max() for name in job.names) > 1e-3
        for name in job.names:
            np.testing.assert_allclose(mine.arrays[name], theirs.arrays[name], atol=1e-5, err_msg=name)


def test_a_model_that_drops_layers_at_random_trains_one_by_one(tiny_settings, tiny_bert, tmp_path, caplog):
    """BART's layerdrop: one number a layer, which would be the same for all clients of a pass."""
    from transformers import AutoTokenizer

    from fedpeft.training import many
    from fedpeft.training.job import Job

    many._say.cache_clear()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with torch.random.fork_rng():
        bart(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = Config.from_dict({**tiny_settings, "model": {"name": str(tmp_path / "base")}, "adapter": {"name": "lora"}})
    parts = assemble(config)
    parts.adapted.base.model.model.encoder.layerdrop = 0.5
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    assert all(trained.fell_back for trained in many.train(parts.adapted, parts.task, config, jobs))
    assert "random numbers of its own" in caplog.text


@pytest.mark.parametrize("make", [*(make for make in MODELS if make is not bart), qwen2, gemma], ids=lambda make: make.__name__)
def test_states_kept_of_the_frozen_layers_change_nothing(make, tiny_settings, tiny_bert, tmp_path):
    """With the adapter in the upper of two layers, and every dropout of the config off. Wherever the layers cannot be left
    out the model is not cut; none of these is such a one."""

    from fedpeft.training import many
    from fedpeft.training.job import Job
    from fedpeft.training.prefix import Prefix

    saved(make, tiny_bert, tmp_path / "base")
    adapter = {"name": "lora", "r": 4, "target_modules": r".*(layer|layers|h)\.1\..*(query|query_proj|q_lin|q_proj|c_attn|Wqkv)"}
    training = {**tiny_settings["training"], "optimizer": "sgd", "learning_rate": 0.1, "max_steps": 3, "prefix_cache": "memory"}
    model = {"name": str(tmp_path / "base"), "dropout": False}
    parts = assemble(config := Config.from_dict({**tiny_settings, "model": model, "adapter": adapter, "training": training}))
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    ended = many.train(parts.adapted, parts.task, config, jobs)
    cut = evaluate.logits(parts.adapted, parts.test, 7)
    assert parts.adapted.prefix._in_training
    assert parts.adapted.prefix._store._kept
    parts.adapted.prefix = Prefix(parts.adapted)
    np.testing.assert_allclose(cut, evaluate.logits(parts.adapted, parts.test, 7), atol=1e-5)
    for mine, theirs in zip(ended, many.train(parts.adapted, parts.task, config, jobs), strict=True):
        for name in theirs.arrays:
            np.testing.assert_allclose(mine.arrays[name], theirs.arrays[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("make", "longest"), [(roberta, 62), (bert, 64)])
def test_texts_longer_than_a_models_positions_are_refused(make, longest, tiny_settings, tiny_bert, tmp_path):
    """RoBERTa's positions are counted from behind that of padding: two of its 64 are no text's."""
    saved(make, tiny_bert, tmp_path / "base")
    settings = {
        **tiny_settings,
        "model": {"name": str(tmp_path / "base")},
        "adapter": {"name": "lora", "r": 4, "target_modules": ["query"]},
    }
    assert assemble(Config.from_dict({**settings, "data": {**settings["data"], "max_length": longest}}))
    with pytest.raises(UserError, match=rf"^data.max_length: {longest + 1} tokens are more than the model's {longest} positions"):
        assemble(Config.from_dict({**settings, "data": {**settings["data"], "max_length": longest + 1}}))
