"""A case of benchmarks/engine.py, loaded: the same clients, batches and start for every contestant. Needs no Flower."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft_loop import TARGETS, UNTRAINED, Work, model, train, without_dropout

from fedpeft import frozen_linear
from fedpeft.base import minilm_folder
from fedpeft.config import Config
from fedpeft.data.encoded import Encoded
from fedpeft.quiet import quiet_libraries
from fedpeft.records import Arrays
from fedpeft.training import many, one
from fedpeft.training.job import Job, batches, dropout_seed, rates
from fedpeft.training.prepare import prepare

MAX_LENGTH = 64
FAST: dict[str, dict[str, Any]] = {  # sections of a config: what may be turned on where not every number has to be the loop's
    "model": {"dtype": "bfloat16"},
    "adapter": {"target_modules": r".*layer\.[345]\..*(query|value)"},  # the upper half of MiniLM
    "training": {"prefix_cache": "memory"},
}
RATES = {"adamw": 1e-3, "sgd": 0.1}
VOCABULARY = 8192  # of the Llama shapes, unless they say otherwise
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4},
    "1b": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    kind: str  # minilm or llama
    clients: int
    batch: int
    steps: int
    dropout: bool = False
    folder: str = ""  # of the base; empty: the packaged MiniLM
    data: str = ""  # of AG News, for MiniLM
    device: str = "cpu"
    dtype: str = "float32"
    optimizer: str = "adamw"


class Contest:
    """The clients' jobs and what trains them."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.folder = case.folder or minilm_folder()
        self.config = Config.from_dict(
            {
                "model": {"name": self.folder, "dtype": case.dtype, "task": TASK[case.kind]},
                "adapter": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": TARGETS[case.kind]},
                "training": {
                    "max_steps": case.steps,
                    "per_device_train_batch_size": case.batch,
                    "optimizer": case.optimizer,
                    "learning_rate": RATES[case.optimizer],
                    "head_init": "random",
                    "device": case.device,
                },
            }
        )
        with quiet_libraries():
            ready = prepare(self.config, 4)
            self.adapted, self.task = ready.adapted, ready.task
            self.model = model(case.kind, self.folder, 4, case.device, case.dtype)
        if not case.dropout:
            for module in (self.adapted.model, self.model):
                without_dropout(module)
        data = (agnews if case.kind == "minilm" else sentences)(case, self.adapted.base.tokenizer)
        rows = np.random.default_rng(0).permutation(len(data)).reshape(case.clients, -1)
        start = self.adapted.read()
        self.jobs = [Job(client, 1, start, self.adapted.trained, data.take(np.sort(mine))) for client, mine in enumerate(rows)]
        self.start = {name: torch.from_numpy(array) for name, array in start.items()}
        self.works = [work(self.config, job) for job in self.jobs]
        self.tokens = sum(len(work.inputs[row]["input_ids"]) for work in self.works for rows in work.batches for row in rows)

    @property
    def flops(self) -> int:
        """Of the floor: two for a multiplication and its sum."""
        return 2 * self.tokens * sum(weight.numel() * (2 if backward else 1) for weight, backward in base_weights(self.adapted.base.model))

    def run(self, name: str) -> list[Arrays]:
        """What `name` makes of every job; of a floor nothing comes."""
        if name == "loop":
            return [train(self.model, self.start, work) for work in self.works]
        if name in FLOORS:
            products(self.adapted.base.model, self.tokens, 512 if self.case.device == "cpu" else self.tokens, FLOORS[name])
            return []
        engine = {"one": one, "many": many}[name]
        return [trained.arrays for trained in engine.train(self.adapted, self.task, self.config, self.jobs)]  # type: ignore[union-attr]

    def padded(self) -> list[Arrays]:
        """The loop with every batch padded to the full length: the same numbers, but for the order of sums."""
        return [train(self.model, self.start, work, MAX_LENGTH) for work in self.works]


def work(config: Config, job: Job) -> Work:
    """The job, as somebody who does not know us would be given it."""
    training, steps = config.training, [part for (part,) in batches(config, job)]
    inputs = [{name: value for name, value in row.items() if name != "token_type_ids"} for row in job.data.inputs]
    clipping = training.max_grad_norm or 1e9
    speeds = rates(config, len(job.data), job.round)
    return Work(
        inputs, list(job.data.labels), steps, speeds, dropout_seed(config, job), training.weight_decay, clipping, training.optimizer
    )


def changed(settings: dict[str, Any], sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A config's settings with other values in some of its sections."""
    return {**settings, **{name: {**settings[name], **values} for name, values in sections.items()}}


TASK = {"minilm": "sequence-classification", "llama": "causal-lm"}


def agnews(case: Case, tokenizer: Any) -> Encoded:
    """Real texts, cut at MAX_LENGTH tokens."""
    import csv
    import gzip

    with gzip.open(pathlib.Path(case.data) / "ag_news" / "train.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = case.clients * case.batch * case.steps
    rows = [rows[number % len(rows)] for number in range(wanted)]  # every client has as many examples as it uses
    names = sorted({row["label"] for row in rows})
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    inputs = [{"input_ids": np.array(row), "attention_mask": np.ones(len(row), np.int64)} for row in ids]
    return Encoded(inputs, np.array([names.index(row["label"]) for row in rows]), len(names))


def sentences(case: Case, tokenizer: Any) -> Encoded:
    """Random tokens, a quarter to all of MAX_LENGTH long; every token but the first trains."""
    draw = np.random.default_rng(1)
    ids = [draw.integers(10, 1000, draw.integers(MAX_LENGTH // 4, MAX_LENGTH + 1)) for _ in range(case.clients * case.batch * case.steps)]
    labels = np.empty(len(ids), dtype=object)
    for place, row in enumerate(ids):
        labels[place] = np.concatenate([[UNTRAINED], row[1:]])
    return Encoded([{"input_ids": row, "attention_mask": np.ones_like(row)} for row in ids], labels, 0)


def write_llama(folder: pathlib.Path, shape: str, dtype: str, device: str = "cpu") -> pathlib.Path:
    """A Llama of a shape with random weights and a tokenizer of numbers, as Transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, **SHAPES[shape]}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    with quiet_libraries(), torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    words = {"<unk>": 0, "<pad>": 1, "</s>": 2, "<s>": 3}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


FLOORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "floor": lambda x, W: x @ W.T,  # as torch multiplies by itself
    "our floor": frozen_linear.product,  # as fedpeft does
}


def products(base: Any, tokens: int, at_once: int, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """x W^T and g W for every linear layer of the base: what the steps on so many tokens cost at the least.

    The inputs of the first adapted layers need no gradient, so that their g W is left out.
    """
    weights = list(base_weights(base))
    device, dtype = weights[0][0].device, weights[0][0].dtype
    x = {width: torch.randn(at_once, width, device=device, dtype=dtype) for weight, _ in weights for width in weight.shape}
    done = 0
    with torch.no_grad():
        while done < tokens:
            n = min(at_once, tokens - done)
            for weight, backward in weights:
                product(x[weight.shape[1]][:n], weight)
                if backward:
                    product(x[weight.shape[0]][:n], weight.T)
            done += n


def base_weights(base: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """Each frozen matrix, and whether its input needs a gradient."""
    for name, module in base.named_modules():
        small = "classifier" in name or "pooler" in name  # they see one token a row, or none
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and not small:
            first = ".0." in name and any(part in name for part in ("query", "key", "value", "q_proj", "k_proj", "v_proj"))
            yield module.weight.detach(), not first


def farthest(left: list[Arrays], right: list[Arrays]) -> float:
    """The largest difference of any number of any client."""
    return max(float(np.abs(a[name] - b[name]).max()) for a, b in zip(left, right, strict=True) for name in b)
