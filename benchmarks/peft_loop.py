"""What somebody writes who has a model, PEFT and a client's batches: the contestants that know nothing of fedpeft.

`train` is one client's turn; engine.py runs it for a client after another on one model, flower_peft.py behind Flower's simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
import transformers

TARGETS = {"minilm": ["query", "value"], "llama": ["q_proj", "v_proj"]}
TASKS = {"minilm": "SEQ_CLS", "llama": "CAUSAL_LM"}
UNTRAINED = -100
OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Work:
    """A client's round: examples, which of them make a batch, and the rate of each step."""

    inputs: list[dict[str, np.ndarray]]  # tokens of each example
    labels: list[Any]  # a class, or a label for each token
    batches: list[np.ndarray]
    rates: list[float]
    seed: int  # of dropout
    weight_decay: float
    max_grad_norm: float
    optimizer: str


def model(kind: str, folder: str, labels: int, device: str = "cpu", dtype: str = "float32") -> Any:
    """The base from disk, with a LoRA of rank 8 by PEFT."""
    if kind == "minilm":
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, dtype=getattr(torch, dtype))
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    config = peft.LoraConfig(task_type=TASKS[kind], r=8, lora_alpha=16, target_modules=TARGETS[kind])
    return peft.get_peft_model(base, config).to(device)


def without_dropout(module: Any) -> None:
    for one in module.modules():
        if isinstance(one, torch.nn.Dropout):
            one.p = 0.0


def train(model: Any, start: dict[str, torch.Tensor], work: Work, length: int | None = None) -> dict[str, np.ndarray]:
    """The adapter (and head) after the client's steps; a batch is padded to its longest row, or to `length`."""
    peft.set_peft_model_state_dict(model, start)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[work.optimizer](trainable, lr=work.rates[0], weight_decay=work.weight_decay)
    torch.manual_seed(work.seed)
    for rate, rows in zip(work.rates, work.batches, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        inputs, labels = batch(work, rows, model.device, length)
        optimizer.zero_grad()
        loss(model, inputs, labels).backward()
        torch.nn.utils.clip_grad_norm_(trainable, work.max_grad_norm)
        optimizer.step()
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def batch(work: Work, rows: Sequence[int], device: Any, length: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    chosen = [work.inputs[row] for row in rows]
    longest = length or max(len(row["input_ids"]) for row in chosen)

    def padded(values: Sequence[np.ndarray], fill: int) -> torch.Tensor:
        return torch.tensor(np.stack([np.pad(value, (0, longest - len(value)), constant_values=fill) for value in values])).to(device)

    labels = [work.labels[row] for row in rows]
    together = padded(labels, UNTRAINED) if np.ndim(labels[0]) else torch.tensor(labels).to(device)
    return {name: padded([row[name] for row in chosen], 0) for name in chosen[0]}, together


def loss(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """The mean over records; of a language model, of each record's mean over its tokens, so that records weigh alike."""
    if labels.ndim == 1:
        return model(**inputs, labels=labels).loss
    logits, wanted = model(**inputs).logits[:, :-1].float(), labels[:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=UNTRAINED, reduction="none")
    return (each.sum(dim=1) / (wanted != UNTRAINED).sum(dim=1).clamp(min=1)).mean()
