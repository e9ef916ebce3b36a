"""Data that lies somewhere: a file, a folder, or a data set on the Hub.

CSV and JSON Lines are read as they stand: a CSV cell is a text, whatever it looks like. Parquet and the Hub come through
`datasets`; the Hub is asked only when a config names something that is neither a table row nor a file nor a folder.
"""

from __future__ import annotations

import csv
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Annotated, Any

from pydantic import Field

from fedpeft.data import pictures
from fedpeft.errors import Problem, UserError
from fedpeft.quiet import quiet_libraries

Rows = list[dict[str, Any]]
Splits = Mapping[str, Rows]
"""Rows by split: "train", and "test" when the place has one of its own."""

HELD_OUT = re.compile(r"(test|validation|valid|val|development|dev|evaluation|eval)(?![a-z])", re.IGNORECASE)
LONGEST_CELL = 2**31 - 1  # characters
TEST, TRAIN = re.compile(r"test(?![a-z])", re.IGNORECASE), re.compile(r"train(?![a-z])", re.IGNORECASE)


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
            return {"train": _read_file(path)} | ({"test": _read_test(test, [path])} if test else {})
        return _read_hub(name, subset, train, test)

    return read


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or _ending(pathlib.Path(name)) in READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)


def _ending(path: pathlib.Path) -> str:
    """The last suffix that is not .gz, in lower case."""
    return next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "")


def _read_folder(folder: pathlib.Path, test: str | None) -> Splits:
    """Files named train and test (`train.csv`, `test-00000-of-00001.parquet`); without a train file, all that is not held out."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _ending(file) in READERS]
    training = [file for file in files if TRAIN.match(file.name)] or [file for file in files if not HELD_OUT.match(file.name)]
    if test is not None:
        inside = folder / test
        test = str(inside) if not pathlib.Path(test).exists() and inside.exists() else test
        training = [file for file in training if file.resolve() != pathlib.Path(test).resolve()]
    if not files and pictures.holds_pictures(folder):
        return pictures.read_folder(folder)
    if not training:
        raise UserError(Problem("data.name", f"the folder {folder} holds no training file", ALLOWED))
    rows = [row for file in training for row in _read_file(file)]
    if test is not None:
        return {"train": rows, "test": _read_test(test, training)}
    held = [row for file in files if TEST.match(file.name) for row in _read_file(file)]
    return {"train": rows} | ({"test": held} if held else {})


def _read_test(test: str, training: list[pathlib.Path]) -> Rows:
    path = pathlib.Path(test).expanduser()
    if path.resolve() in [file.resolve() for file in training]:
        raise UserError(
            Problem("data.test", f"{path} is the training file too", do="name another file, or leave it out for data.test_fraction")
        )
    return _read_file(path, "data.test")


def _read_file(path: pathlib.Path, where: str = "data.name") -> Rows:
    if not path.is_file():
        raise UserError(Problem(where, f"there is no file {path}", do="give the path of a CSV, JSON Lines or parquet file"))
    reader = READERS.get(_ending(path))
    if reader is None:
        raise UserError(Problem(where, f"{path} is of no kind that can be read", ALLOWED))
    try:
        rows = list(reader(path))
    except (OSError, EOFError, UnicodeDecodeError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise UserError(Problem(where, f"{path} cannot be read: {error}")) from error
    if not rows:
        raise UserError(Problem(where, f"{path} holds no rows"))
    return rows


def _open(path: pathlib.Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_csv(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)  # of this process
    with _open(path) as file:
        reader = csv.DictReader(file, delimiter="\t" if _ending(path) == ".tsv" else ",", strict=True)
        header = list(reader.fieldnames or ())
        if twice := [name for name in header if header.count(name) > 1]:
            raise ValueError(f'the header names "{twice[0]}" twice')
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not as many cells as the header")
            yield row


def _read_json(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """An object a line, or one list of objects."""
    with _open(path) as file:
        text = file.read()
    whole = json.loads(text) if text.lstrip().startswith("[") else None
    lines = text.split("\n")  # and nowhere else: U+2028 and its kin may stand inside a text
    for number, row in enumerate(whole if whole is not None else (json.loads(line) for line in lines if line.strip()), 1):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} is no object")
        yield row


def _read_parquet(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    import datasets

    # Streaming leaves no copy in a cache folder, and so can never serve an old one.
    found = _undecoded(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    yield from (_named(row, found.features or {}) for row in found)


def _undecoded(found: Any) -> Any:
    """Pictures stay bytes: a broken one is a row's affair, and not the file's."""
    import datasets

    for column, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
    return found


def _named(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """Classes by name, where the data set keeps numbers beside the names."""
    import datasets

    named = {column: feature for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
    return row | {
        column: feature.int2str(code) if (code := row[column]) is not None and code >= 0 else None for column, feature in named.items()
    }


READERS: dict[str, Callable[[pathlib.Path], Iterator[dict[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""How a file is read, by its ending; text files may be gzipped (`.csv.gz`)."""

ALLOWED = f"{', '.join(READERS)}; text files also with .gz"


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
    parts = {role: _undecoded(found[split]) for role, split in wanted.items()}
    return {role: [_named(row, part.features) for row in part] for role, part in parts.items()}
