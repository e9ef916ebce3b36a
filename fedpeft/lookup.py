"""The one table of every name that a config may use, and the way from a name to what it names.

A row is "module:attribute"; nothing is imported before it is asked for. A name may also be `"my_file.py:my_function"`
or `"my_package.module:attribute"`: then no row is needed. What is named is a frozen `Settings` class, or a function
whose keyword-only parameters are its settings; either way the settings are config keys, checked by pydantic.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import importlib.util
import inspect
import pathlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from fedpeft.errors import Problem, UserError, nearest

TABLES: dict[str, dict[str, str]] = {
    "strategy": {
        "fedavg": "fedpeft.strategies.fedavg:FedAvg",
        "ffa_lora": "fedpeft.strategies.ffa_lora:FfaLora",
        "lora_fair": "fedpeft.strategies.lora_fair:LoraFair",
        "fedsmooth_lora": "fedpeft.strategies.fedsmooth_lora:FedSmoothLora",
        "flora_na": "fedpeft.strategies.flora_na:FloraNa",
        "flora": "fedpeft.strategies.flora:Flora",
        "fedex_lora": "fedpeft.strategies.fedex_lora:FedexLora",
        "flex_lora": "fedpeft.strategies.flex_lora:FlexLora",
        "ro_lora": "fedpeft.strategies.ro_lora:RoLora",
        "fed_svd": "fedpeft.strategies.fed_svd:FedSvd",
        "het_lora": "fedpeft.strategies.het_lora:HetLora",
        "fedsa_lora": "fedpeft.strategies.fedsa_lora:FedsaLora",
        "fed_sb": "fedpeft.strategies.fed_sb:FedSb",
        "fed_ask": "fedpeft.strategies.fed_ask:FedAsk",
        "slora": "fedpeft.strategies.slora:Slora",
        "scaffold": "fedpeft.strategies.scaffold:Scaffold",
        "fedprox": "fedpeft.strategies.fedprox:FedProx",
        "fedavgm": "fedpeft.strategies.server_optimizers:FedAvgM",
        "fedadam": "fedpeft.strategies.server_optimizers:FedAdam",
        "fedyogi": "fedpeft.strategies.server_optimizers:FedYogi",
        "fedadagrad": "fedpeft.strategies.server_optimizers:FedAdagrad",
        "median": "fedpeft.strategies.robust:Median",
        "trimmed_mean": "fedpeft.strategies.robust:TrimmedMean",
        "krum": "fedpeft.strategies.robust:Krum",
        "multi_krum": "fedpeft.strategies.robust:MultiKrum",
    },
    "adapter": {
        "lora": "fedpeft.adapters.lora:Lora",
        "lora_sb": "fedpeft.adapters.lora_sb:LoraSb",
        "lora_fa": "fedpeft.adapters.lora_fa:LoraFa",
        "fora": "fedpeft.adapters.fora:Fora",
        "dora": "fedpeft.adapters.lora:Dora",
        "bd_lora": "fedpeft.adapters.lora:BdLora",
        "miss": "fedpeft.adapters.miss:Miss",
        "frod": "fedpeft.adapters.frod:Frod",
        "vera": "fedpeft.adapters.vera:Vera",
        "randlora": "fedpeft.adapters.randlora:RandLora",
        "unilora": "fedpeft.adapters.unilora:UniLora",
        "fourierft": "fedpeft.adapters.fourierft:FourierFt",
        "shira": "fedpeft.adapters.shira:Shira",
        "vblora": "fedpeft.adapters.vblora:VbLora",
        "c3a": "fedpeft.adapters.c3a:C3a",
        "ln_tuning": "fedpeft.adapters.ln_tuning:LnTuning",
    },
    "init": {
        "kaiming": "fedpeft.adapters.inits:Init",
        "pissa": "fedpeft.adapters.inits:Pissa",
        "olora": "fedpeft.adapters.inits:Olora",
        "lora_ga": "fedpeft.adapters.inits:LoraGa",
    },
    "partitioner": {
        "iid": "fedpeft.data.partitions.iid:iid",
        "dirichlet": "fedpeft.data.partitions.dirichlet:dirichlet",
        "shards": "fedpeft.data.partitions.shards:shards",
        "quantity": "fedpeft.data.partitions.quantity:quantity",
        "natural": "fedpeft.data.partitions.natural:natural",
        "domain": "fedpeft.data.partitions.domain:domain",
    },
    "source": {
        "docstrings": "fedpeft.data.docstrings:docstrings",
    },
    "model": {
        "minilm": "fedpeft.base:minilm_folder",
    },
    "task": {
        "sequence-classification": "fedpeft.tasks.sequence_classification:SequenceClassification",
        "causal-lm": "fedpeft.tasks.causal_lm:CausalLM",
        "image-classification": "fedpeft.tasks.image_classification:ImageClassification",
    },
    "chat_template": {
        "plain": "fedpeft.tasks.chat:plain",
        "instruction": "fedpeft.tasks.chat:instruction",
        "dialogue": "fedpeft.tasks.chat:dialogue",
    },
    "scorer": {
        "exact_match": "fedpeft.tasks.generation:exact_match",
        "final_number": "fedpeft.tasks.generation:final_number",
        "rouge_l": "fedpeft.tasks.generation:rouge_l",
    },
    "engine": {
        "one": "fedpeft.training.one:train",
        "many": "fedpeft.training.many:train",
    },
    "evaluation": {
        "one": "fedpeft.training.evaluate:each",
        "many": "fedpeft.training.evaluate_many:each",
    },
    "optimizer": {
        "adamw": "fedpeft.training.optimizers:adamw",
        "sgd": "fedpeft.training.optimizers:sgd",
    },
    "stacked_optimizer": {
        "adamw": "fedpeft.training.optimizers:StackedAdamW",
        "sgd": "fedpeft.training.optimizers:StackedSgd",
    },
    "schedule": {
        "constant": "fedpeft.training.schedules:constant",
        "linear": "fedpeft.training.schedules:linear",
        "cosine": "fedpeft.training.schedules:cosine",
    },
    "head_init": {
        "random": "fedpeft.training.surveys:Nothing",
        "class_statistics": "fedpeft.training.surveys:ClassStatistics",
    },
    "simulation": {
        "in-process": "fedpeft.simulations.grid:LocalGrid",
        "ray": "fedpeft.simulations.ray_grid:RayGrid",
    },
}


class Settings(BaseModel):
    """Frozen, validated settings: the base of everything a config can name."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_only_installed = contextvars.ContextVar("only_installed", default=False)


@contextmanager
def only_installed() -> Iterator[None]:
    """Inside the block no name leads outside the tables: for names that another machine has sent."""
    token = _only_installed.set(True)
    try:
        yield
    finally:
        _only_installed.reset(token)


def find(kind: str, name: str, where: str | None = None, fallback: str | None = None) -> Any:
    """The object called `name` in the table of `kind`, or in the user's own file or package, or else what the `fallback` row
    makes of the name.

    Raises UserError with the nearest known name when there is none. `where` is the config key for the message.
    """
    where = where or f"{kind}.name"
    table = TABLES[kind]
    if name in table:
        return _load(table[name])
    if ":" in name:
        return _find_own(name, where)
    if fallback is not None:
        return _load(fallback)(name)
    known = ", ".join(sorted(table))
    raise UserError(Problem(where, f'no {kind} is called "{name}"', f'{known}, or your own as "file.py:function"', nearest(name, table)))


def _load(row: str) -> Any:
    module, _, attribute = row.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _find_own(name: str, where: str) -> Any:
    if _only_installed.get():
        raise UserError(Problem(where, f'"{name}" is code that is not part of fedpeft', "names that fedpeft list prints"))
    place, _, attribute = name.rpartition(":")
    path = pathlib.Path(place).resolve()
    if place.endswith(".py") and not path.is_file():
        raise UserError(Problem(where, f'"{name}": there is no file {path}', do="give the path of a Python file"))
    try:
        module = _run_file(path) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # it is the person's own code: whatever it raises is theirs to mend
        said = f"{type(error).__name__}: {error}"
        raise UserError(
            Problem(where, f'"{name}" cannot be imported ({said})', do='mend it, install the package, or use "file.py:function"')
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(Problem(where, f'"{name}": {place} has no function or class "{attribute}"'))
    return found


@functools.cache
def _run_file(path: pathlib.Path) -> types.ModuleType:
    """The module in a person's own file, run once."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of(target: Any) -> type[BaseModel]:
    """The pydantic model of what `target` may be told: its own fields, or its keyword-only parameters."""
    if inspect.isclass(target) and issubclass(target, BaseModel):
        return target
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(target, eval_str=True).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            empty = inspect.Parameter.empty
            default = ... if parameter.default is empty else parameter.default
            fields[parameter.name] = (Any if parameter.annotation is empty else parameter.annotation, default)
    return create_model(f"{target.__name__}_settings", __base__=Settings, **fields)


def first_line(target: Any) -> str:
    """The first sentence of what a named thing says of itself."""
    lines = (inspect.getdoc(target) or "").strip().splitlines()
    return lines[0] if lines else ""
