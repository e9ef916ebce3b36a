"""YAML with line numbers: so that a message about a key can say where the key stands."""

from __future__ import annotations

import pathlib
from typing import Any

import yaml

from fedpeft.errors import Problem, UserError

Path = tuple[str, ...]
"""A dotted key as its parts: strategy.num_rounds is ("strategy", "num_rounds")."""


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[Path, int]]:
    """The mapping in the file, and the line (from 1) of every key. Raises UserError for what is no YAML mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(Problem(str(path), f"cannot be read ({error.strerror})", do="give the path of a YAML file")) from error
    except UnicodeDecodeError as error:
        raise UserError(Problem(str(path), "is not UTF-8 text", do="give the path of a YAML file")) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(Problem(f"{path}{line}", f"is not valid YAML: {getattr(error, 'problem', error)}")) from error
    if root is None:
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(Problem(str(path), "holds no mapping of keys to values", do='write "section: {key: value}"'))
    lines: dict[Path, int] = {}
    _number_keys(root, (), lines, path)
    return data, lines


def _number_keys(node: yaml.MappingNode, above: Path, lines: dict[Path, int], path: pathlib.Path) -> None:
    for key, value in node.value:
        here = (*above, str(key.value))
        line = key.start_mark.line + 1
        if here in lines:
            raise UserError(
                Problem(f"{path}, line {line}", f'"{".".join(here)}" stands twice (first in line {lines[here]})', do="keep one of the two")
            )
        lines[here] = line
        if isinstance(value, yaml.MappingNode):
            _number_keys(value, here, lines, path)
