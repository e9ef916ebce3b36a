"""`fedpeft export`: what a run has made, for those who use it elsewhere: its adapter, or the whole model.

    W' = W + Delta W,   W the base as the run had it, Delta W what PEFT says of the adapter (LoRA: s B A), added in float32

The merged model is a plain Transformers folder with tokenizer and class names; nobody who loads it needs PEFT or fedpeft.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

from fedpeft import base
from fedpeft.adapters.frozen import pretrained
from fedpeft.config import Config
from fedpeft.errors import Problem, UserError
from fedpeft.quiet import quiet_libraries
from fedpeft.runs import Run, read_run
from fedpeft.sections import TrainingSection
from fedpeft.server import checkpoint
from fedpeft.server.run_folder import RunFolder
from fedpeft.units import format_bytes


def export(run: pathlib.Path, to: pathlib.Path, client: str | None, merge: bool, dtype: str) -> str:
    """Fill the new folder `to` with the adapter of a finished run, or of one client's own, or with the model it merges into.

    Returns what was written, in a line. Raises UserError; then `to` is as it was.
    """
    done, folder = read_run(run), RunFolder(run)
    adapter = folder.adapter if client is None else folder.personal(client)
    if not (adapter / "adapter_config.json").is_file():
        names = ", ".join(sorted(place.name for place in folder.personal("").glob("*"))) or "none: the strategy has one model for all"
        raise UserError(Problem("RUN" if client is None else "--client", f"there is no adapter in {adapter}", f"clients: {names}"))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(Problem("--to", f"{to} is there and not empty", do="name another folder"))
    beside = to.absolute().with_name(f".{to.absolute().name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        said = _merged(done, folder, adapter, beside, dtype) if merge else _copied(done, adapter, beside)
        os.replace(beside, to)
    except OSError as error:
        raise UserError(Problem("--to", f"{to} cannot be written ({error.strerror or error})")) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return f"{to}: {said}"


def _copied(done: Run, adapter: pathlib.Path, to: pathlib.Path) -> str:
    shutil.copytree(adapter, to)
    settings = json.loads((to / "adapter_config.json").read_text(encoding="utf-8"))
    said = f"{settings['peft_type']} for {settings['base_model_name_or_path']}"
    if "r" not in settings:
        return said
    rank, trained = max([settings["r"], *(settings.get("rank_pattern") or {}).values()]), done.config["adapter"].get("r")
    grown = isinstance(trained, int) and rank > trained  # clients of their own ranks have no one rank
    more = f" (trained with {trained}: what went into the backbone is part of it, exactly)" if grown else ""
    return f"{said}, of rank {rank}{more}"


def _merged(done: Run, folder: RunFolder, adapter: pathlib.Path, to: pathlib.Path, dtype: str) -> str:
    import torch
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper

    config, labels = Config.load(folder.config), list(done.summary.get("labels", ()))
    if config.model.quantization is not None:
        got = f"the run's base was quantised ({config.model.quantization}), and the adapter fits that one"
        raise UserError(Problem("--merge", got, do="export without --merge"))
    with quiet_libraries():
        task = config.model.build()
        section = config.model.model_copy(update={"dropout": True})  # what the run switched off is on again for the next
        loaded = base.load(section, task, len(labels), TrainingSection(device="cpu"), config.seed)
        _check(loaded, folder)
        try:
            model = PeftModel.from_pretrained(loaded.model.float(), str(adapter))
            _untie(model)
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # numbers that are none
            raise UserError(Problem("--merge", f"PEFT refuses: {error}", do="export without --merge")) from error
        for name, head in [(name, part) for name, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)]:
            model.set_submodule(name, head.modules_to_save[head.active_adapter])  # PEFT leaves it wrapped where norms were tuned
        if labels:
            model.config.id2label, model.config.label2id = dict(enumerate(labels)), {name: code for code, name in enumerate(labels)}
        model.to(getattr(torch, dtype)).save_pretrained(str(to))
        loaded.tokenizer.save_pretrained(str(to))
    size = sum(file.stat().st_size for file in to.iterdir())
    return f"{type(model).__name__} with the adapter merged in, {dtype}, {format_bytes(size)}"


def _untie(model: Any) -> None:
    """Give an adapted weight that another layer shares (tied embeddings) to the adapted layer alone: the other has no adapter."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {id(layer.get_base_layer()): layer.get_base_layer() for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    weights = {id(layer.weight) for layer in adapted.values() if getattr(layer, "weight", None) is not None}
    others = [part for part in model.modules() if id(part) not in adapted and id(part._parameters.get("weight")) in weights]
    for part in others:
        part.weight = torch.nn.Parameter(part.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _check(loaded: base.Base, folder: RunFolder) -> None:
    """Raises UserError when the base is not the one that the run had."""
    kept = checkpoint.latest(folder.checkpoint)
    if kept is not None and (then := pretrained(kept.base)) != loaded.fingerprint:
        got = f"the base is another than the run's (fingerprint {loaded.fingerprint}, then {then})"
        raise UserError(Problem("model.name", got, do="put the weights back that the run was made with"))
