"""pydantic's complaints about a config, as lines of ours: what we got, what is allowed, where it was set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedpeft import yaml_file
from fedpeft.errors import Problems, nearest

Where = Callable[[yaml_file.Path], str]
"""Says where a key was set: file and line, or the command line."""


def inside(field: FieldInfo) -> Any:
    """The type of a field, without the None that it may also be."""
    return next((kind for kind in get_args(field.annotation) if kind is not type(None)), field.annotation)


def explain(detail: ErrorDetails, model: type[BaseModel], above_model: yaml_file.Path, where: Where, problems: Problems) -> None:
    """One of pydantic's complaints about `model`, which stands at `above_model` in the config, as one line of ours."""
    path = (*above_model, *(str(part) for part in detail["loc"]))
    if detail["type"] == "extra_forbidden":
        above: Any = model
        for part in path[:-1]:
            above = inside(above.model_fields[part])
        known = list(above.model_fields)
        problems.add(where(path), "unknown key", ", ".join(known), nearest(path[-1], known))
    elif detail["type"] == "missing":
        problems.add(where(path), "is missing", do="give it a value")
    else:
        message = detail["msg"][0].lower() + detail["msg"][1:]
        got = detail["input"]
        problems.add(where(path), message if isinstance(got, dict | BaseModel) else f"got {got!r}; {message}")
