"""Data that lies somewhere: a file, a folder, or a data set on the Hub. All are read through `datasets`.

The Hub is asked only when a config names something that is neither a table row nor a file nor a folder.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from fedpeft.errors import Problem, UserError
from fedpeft.quiet import quiet_libraries

FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""File endings (`.gz` may follow) and the reader of `datasets` for each."""

# CSV cells are taken as they stand: the string "NA" is a text, not a missing value.
READER_OPTIONS: dict[str, dict[str, Any]] = {"csv": {"keep_default_na": False}, "json": {}, "parquet": {}}

Rows = list[dict[str, Any]]
Splits = Mapping[str, Rows]
"""Rows by split: "train", and "test" when the place has one of its own."""


def place(name: str) -> Callable[..., Splits]:
    """The source that reads the file, folder or Hub data set called `name`."""

    def read(
        *,
        test: Annotated[
            str | None, Field(description="the test split: a file, or a split of the Hub data set; null: the folder's own")
        ] = None,
        train: Annotated[str, Field(description="the training split of a Hub data set")] = "train",
        subset: Annotated[str | None, Field(description="the configuration of a Hub data set that has several")] = None,
    ) -> Splits:
        """Rows of the place, by split."""
        path = pathlib.Path(name).expanduser()
        if path.is_dir():
            return _read_folder(path, test)
        if path.is_file() or _looks_like_path(name):
            return {"train": _read_file(path)} | ({"test": _read_file(pathlib.Path(test))} if test else {})
        return _read_hub(name, subset, train, test)

    return read


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or _ending(pathlib.Path(name)) in FORMATS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)


def _ending(path: pathlib.Path) -> str:
    """The last suffix that is not .gz."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix != ".gz"), "")


def _read_file(path: pathlib.Path) -> Rows:
    if not path.is_file():
        raise UserError(Problem("data.name", f"there is no file {path}", do="give the path of a CSV, JSON Lines or parquet file"))
    kind = FORMATS.get(_ending(path))
    if kind is None:
        raise UserError(Problem("data.name", f"{path} is of no kind that can be read", f"{', '.join(FORMATS)}, each also with .gz"))
    import datasets

    options = dict(READER_OPTIONS[kind]) | ({"sep": "\t"} if _ending(path) == ".tsv" else {})
    try:
        # Streaming leaves no copy in a cache folder, and so can never serve an old one.
        rows = list(datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options))
    except Exception as error:  # the readers behind `datasets` raise a dozen kinds; each means the same to a person
        raise UserError(Problem("data.name", f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}")) from error
    if not rows:
        raise UserError(Problem("data.name", f"{path} holds no rows"))
    return rows


def _read_folder(folder: pathlib.Path, test: str | None) -> Splits:
    """`train.*` and `test.*` when there is a train file; otherwise every readable file is training data."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _ending(file) in FORMATS]
    if not files:
        raise UserError(Problem("data.name", f"the folder {folder} holds no data file", f"{', '.join(FORMATS)}, each also with .gz"))
    by_stem = {file.name.split(".")[0]: file for file in files}
    test_file = pathlib.Path(test) if test else by_stem.get("test") if "train" in by_stem else None
    train_files = [by_stem["train"]] if "train" in by_stem else [file for file in files if file != test_file]
    rows = [row for file in train_files for row in _read_file(file)]
    return {"train": rows} | ({"test": _read_file(test_file)} if test_file else {})


def _read_hub(name: str, subset: str | None, train: str, test: str | None) -> Splits:
    import datasets

    wanted = {"train": train} | ({"test": test} if test else {})
    try:
        with quiet_libraries():
            found = datasets.load_dataset(name, subset)
    except Exception as error:  # offline, unknown, gated: the library raises many kinds
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise UserError(
            Problem(
                "data.name",
                f'"{name}" is no file or folder here, and the Hub gave no data set of that name ({reason})',
                do="check the name and the network",
            )
        ) from error
    if not test and "test" in found:
        wanted["test"] = "test"
    missing = [split for split in wanted.values() if split not in found]
    if missing:
        raise UserError(Problem("data.name", f'"{name}" has no split {", ".join(missing)}', ", ".join(found)))
    rows = {role: list(found[split]) for role, split in wanted.items()}
    for role, split in wanted.items():  # the Hub stores classes as numbers beside their names
        for column, feature in found[split].features.items():
            if isinstance(feature, datasets.ClassLabel):
                for row in rows[role]:
                    row[column] = feature.int2str(row[column]) if row[column] >= 0 else None
    return rows
