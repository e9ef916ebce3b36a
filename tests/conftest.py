"""Shared by all tests: no Hub, one thread, a tiny real-tokenizer BERT, and the small real data where it lies."""

from __future__ import annotations

import json
import os
import pathlib
import warnings

import pytest

from fedpeft import environment

environment.prepare()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in every process a test starts: other threads, other sums, other bits

ROOT = pathlib.Path(__file__).parent.parent
REAL_DATA = pathlib.Path(os.environ.get("FEDPEFT_DATA", ROOT.parent / "shared" / "data"))

TOPICS = {
    "sport": ["the team won the match", "a late goal in the final", "the coach praised the players", "they lost the cup game"],
    "money": ["the bank raised its rates", "shares fell on the market", "profits of the company grew", "the loan was repaid early"],
    "space": ["the rocket reached its orbit", "a new moon of the planet", "the telescope saw a star", "astronauts landed today"],
}


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets, where this machine has it."""
    if not REAL_DATA.is_dir():
        pytest.skip("the real data sets are not on this machine (set FEDPEFT_DATA to their folder)")
    return REAL_DATA


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A two-layer BERT with random weights and MiniLM's real tokenizer, saved like any Hugging Face model: a folder of 4 MB."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from fedpeft.base import minilm_folder

    folder = tmp_path_factory.mktemp("tiny_bert")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def topics_csv(tmp_path_factory):
    """96 short texts of three topics, with an owner and a domain each."""
    file = tmp_path_factory.mktemp("topics") / "topics.csv"
    rows = ["text,label,client,domain"]
    for round in range(8):
        for number, (label, texts) in enumerate(TOPICS.items()):
            rows += [f"{text} {round},{label},owner{(round + number) % 4},{'print' if round % 2 else 'radio'}" for text in texts]
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture
def tiny_settings(tiny_bert, topics_csv):
    """A whole run that takes a second: four clients, three rounds."""
    return {
        "name": "tiny",
        "model": {"name": str(tiny_bert)},
        "data": {"name": str(topics_csv), "max_length": 16, "test_fraction": 0.25},
        "partition": {"name": "dirichlet", "clients": 4, "alpha": 0.5, "min_examples": 4},
        "adapter": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
        "strategy": {"num_rounds": 3},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "head_init": "random",
            "engine": "one",  # what ends at the same bits whoever trains beside whom; tests of engine many say so
        },
    }


@pytest.fixture
def tiny_config(tiny_settings):
    from fedpeft import Config

    return Config.from_dict(tiny_settings)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A two-layer Llama with random weights whose tokens are bytes: what trains can be counted on one's fingers. No pad token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_llama")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({token: number for number, token in enumerate(["<s>", "</s>", *letters])}, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=0, eos_token_id=1, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums_jsonl(tmp_path_factory):
    """60 small sums as instructions, in two categories."""
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [
        {"prompt": f"{a}{sign}{b}", "context": "", "completion": f"is {a + b if sign == '+' else a - b}", "category": kind}
        for sign, kind in (("+", "plus"), ("-", "minus"))
        for a in range(6)
        for b in range(5)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def tiny_lm_settings(tiny_llama, sums_jsonl):
    """Instruction tuning in a second: a client a category."""
    return {
        "name": "tiny-lm",
        "model": {"name": str(tiny_llama), "task": "causal-lm", "chat_template": "plain", "samples": 2, "max_new_tokens": 4},
        "data": {"name": str(sums_jsonl), "columns": {"client": "category"}, "max_length": 24, "test_fraction": 0.2},
        "partition": {"name": "natural"},
        "adapter": {"name": "lora", "r": 4, "target_modules": "all-linear"},
        "strategy": {"num_rounds": 2},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    }


COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def png(colour, noise):
    """A picture of one colour, with noise."""
    import io

    import numpy as np
    from PIL import Image

    pixels = np.clip(np.array(colour) + np.random.default_rng(noise).normal(0, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def pictures(count=48):
    """Rows with bytes: three colours in two domains."""
    names = list(COLOURS)
    return [
        {"image": {"bytes": png(COLOURS[names[n % 3]], n), "path": None}, "label": names[n % 3], "domain": "dark" if n % 2 else "light"}
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def pictures_parquet(tmp_path_factory):
    """The same rows as the Hub would keep them."""
    import datasets

    file = tmp_path_factory.mktemp("pictures") / "pictures.parquet"
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS)), "domain": datasets.Value("string")}
    datasets.Dataset.from_list(pictures(), features=datasets.Features(features)).to_parquet(file)
    return file


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    """A two-layer ViT with random weights and a head for ten other classes."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny_vit")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=10, **sizes)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_picture_settings(tiny_vit, pictures_parquet):
    """Classes of pictures in a second: a client a domain."""
    return {
        "name": "tiny-pictures",
        "model": {"name": str(tiny_vit), "task": "image-classification"},
        "data": {"name": str(pictures_parquet), "test_fraction": 0.25},
        "partition": {"name": "domain", "clients": 2},
        "adapter": {"name": "lora", "r": 4, "target_modules": "all-linear"},
        "strategy": {"num_rounds": 2},
        "training": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    }
