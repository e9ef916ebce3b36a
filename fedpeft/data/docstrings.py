"""The data of the quickstart: real text that lies on every machine with Python, the standard library's docstrings.

Two questions may be asked of a docstring:

    returns   does this function return a value?   From the code beside it: a `return` with a value, or a `yield`.
    package   which package is it from?            Nearly solved by a linear probe on frozen embeddings.

A client is a package: ten teams with their own habits of writing, each of which keeps its text at home.
"""

from __future__ import annotations

import ast
import pathlib
import sysconfig
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from fedpeft.errors import Problem, UserError

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "mailbox", "multiprocessing", "tkinter", "unittest", "xml")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef


def docstrings(
    *,
    question: Annotated[Literal["returns", "package"], Field(description="what is asked of a docstring")] = "returns",
    packages: Annotated[list[str], Field(min_length=2, description="packages and modules of the standard library")] = list(PACKAGES),  # noqa: B006
) -> list[dict[str, Any]]:
    """Docstrings of the standard library, one row each: text, label, client (its package), name.

    The number of rows depends on the Python version (about 2,400 on 3.11). Packages that this Python lacks are left
    out; with fewer than two left a UserError is raised.
    """
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    answer = QUESTIONS[question]
    rows: list[dict[str, Any]] = []
    for package in sorted(packages):
        for node in _documented(library, package):
            if (said := answer(package, node)) is not None:
                text = " ".join((ast.get_docstring(node) or "").split())
                rows.append({"text": text, "label": said, "client": package, "name": node.name})
    if len({row["client"] for row in rows}) < 2:
        raise UserError(Problem("data.packages", f"fewer than two of {', '.join(packages)} were found in {library}", do="name others"))
    return rows


def _documented(library: pathlib.Path, package: str) -> Iterator[Documented]:
    """Every function and class of a package that has a docstring, in the order of files and lines; its tests left out."""
    folder = library / package
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    for file in files:
        if file.is_file() and not {"test", "tests"} & set(file.relative_to(library).parts):
            for node in _nodes(ast.parse(file.read_text(encoding="utf-8"))):
                if (ast.get_docstring(node) or "").strip():
                    yield node


def _nodes(parent: ast.Module | Documented) -> Iterator[Documented]:
    for node in parent.body:
        if isinstance(node, Documented):
            yield node
            yield from _nodes(node)


def _returns(package: str, node: Documented) -> str | None:
    """None for a class, which has no return."""
    if isinstance(node, ast.ClassDef):
        return None
    return "returns" if any(_gives_value(inner) for inner in _own_body(node)) else "returns nothing"


def _own_body(node: ast.AST) -> Iterator[ast.AST]:
    """The statements and expressions of a function, without those of functions inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _own_body(child)


def _gives_value(node: ast.AST) -> bool:
    if isinstance(node, ast.Return):
        return node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None)
    return isinstance(node, ast.Yield | ast.YieldFrom)


QUESTIONS: dict[str, Callable[[str, Documented], str | None]] = {
    "returns": _returns,
    "package": lambda package, node: package,
}
