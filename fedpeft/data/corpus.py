"""From a source's rows to what the run works on: checked `Examples`, a train part to deal out and a test part for the server."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft import seeds
from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, Problems, UserError
from fedpeft.sections import Columns, DataSection

Row = Mapping[str, Any]
MISSING = frozenset({"", "None"})  # how a label that is not there looks as text


class Reading(Protocol):
    """What a task says of the rows it wants (`tasks/task.py`)."""

    needs_labels: Any
    may_be_empty: Any

    @property
    def label_sets(self) -> bool: ...  # noqa: D102

    def roles(self, columns: Columns) -> dict[str, str]: ...  # noqa: D102

    def unfit(self, role: str, cell: Any) -> str | None: ...  # noqa: D102

    def classes(self, cell: Any) -> tuple[str, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Corpus:
    """The data of a run, before it is dealt out."""

    train: Examples  # dealt to the clients
    test: Examples  # stays with the server, which evaluates on it: the test part, or the validation part


def load(data: DataSection, task: Reading, seed: int) -> Corpus:
    """Read the source that `data` names, check every row, and split off the test part, or a validation part beside it.

    Raises UserError for missing columns, cells of the wrong kind, and labels outside the set, each with the row. Rows that
    hold nothing are skipped.
    """
    splits = _rows(data)
    for split, rows in splits.items():
        _check_columns(rows, data, task, split)
    names = tuple(data.labels) if data.labels else _label_names(splits["train"], data, task)  # of all rows: some may have no example left
    if data.max_examples is not None and data.max_examples < len(splits["train"]):
        kept = np.sort(seeds.generator(seed, "max_examples").choice(len(splits["train"]), data.max_examples, replace=False))
        splits = {**splits, "train": [splits["train"][row] for row in kept]}
    parts = {split: _examples(rows, data, task, names, split) for split, rows in splits.items()}
    if "test" in parts:
        corpus = Corpus(parts["train"], parts["test"])
    else:
        corpus = _hold_out(parts["train"], data.test_fraction, seed, "test_split")
    if data.evaluate_on == "validation":  # what is set aside for the test neither trains nor evaluates
        return _hold_out(corpus.train, data.test_fraction, seed, "validation_split")
    return corpus


def held_by_server(data: DataSection, task: Reading, seed: int) -> Examples:
    """What a server evaluates on when its clients hold the training examples: the test part, as in a simulation, or with
    `test_fraction` 0 and no test split everything that `data` names."""
    if data.test_fraction == 0 and "test" not in (rows := _rows(data)):
        return _checked(rows["train"], data, task, data.labels, "test")
    return load(data, task, seed).test


def held_by_client(data: DataSection, task: Reading, labels: Sequence[str] | None) -> Examples:
    """What a client trains on: all the rows that its own `data` section names. Its labels must be among `labels`, if given."""
    return _checked(_rows(data)["train"], data, task, labels, "train")


def _checked(rows: Sequence[Row], data: DataSection, task: Reading, labels: Sequence[str] | None, split: str) -> Examples:
    _check_columns(rows, data, task, split)
    return _examples(rows, data, task, tuple(labels) if labels else _label_names(rows, data, task), split)


def _rows(data: DataSection) -> dict[str, list[Row]]:
    """What the source gives, in one form: rows by split. A source may be a person's own function, so nothing is taken for granted."""
    try:
        found = data.build()
    except UserError:
        raise
    except Exception as error:
        raise UserError(Problem("data.name", f"{data.name} raised {type(error).__name__}: {error}")) from error
    splits = dict(found) if isinstance(found, Mapping) else {"train": found}
    shaped = {split: list(rows) for split, rows in splits.items() if isinstance(rows, Iterable)}
    whole = shaped.keys() == splits.keys() and all(rows and all(isinstance(row, Mapping) for row in rows) for rows in shaped.values())
    if not whole or not {"train"} <= shaped.keys() <= {"train", "test"}:
        raise UserError(Problem("data.name", f"{data.name} gives no rows", 'a list of dicts, or {"train": [...], "test": [...]}'))
    return shaped


def _check_columns(rows: Sequence[Row], data: DataSection, task: Reading, split: str) -> None:
    there = set(rows[0])
    problems = Problems()
    wanted = {f"data.columns.{role}": column for role, column in task.roles(data.columns).items()}
    if task.needs_labels:
        wanted["data.columns.label"] = data.columns.label
    for key in ("label", "client", "domain"):  # used when there, asked for only when the config names another than the usual one
        if (column := getattr(data.columns, key)) not in (None, Columns.model_fields[key].default):
            wanted[f"data.columns.{key}"] = column
    for key, column in wanted.items():
        if column not in there:
            problems.add(
                key,
                f'the {split} rows of {data.name} have no column "{column}"',
                ", ".join(sorted(there)),
                "name the column under data.columns",
            )
    own = (data.columns.label, data.columns.client, data.columns.domain)
    used = {*wanted.values(), *(column for column in own if column is not None and column in there)}
    for number, row in enumerate(rows, 1):
        if not problems.found and (lost := sorted(column for column in used if column not in row)):
            problems.add("data.name", f'row {number} of the {split} rows of {data.name} has no "{lost[0]}"')
    problems.raise_if_any()


def _label_names(rows: Sequence[Row], data: DataSection, task: Reading) -> tuple[str, ...]:
    """The classes that occur in rows that hold something: numbers in their order, anything else by name."""
    column, roles = data.columns.label, task.roles(data.columns)
    there = (row[column] for row in rows if column in row and not _empty(row, roles, task))
    values = {name for cell in there if cell == cell for name in task.classes(cell)} - MISSING  # not a number is not itself
    numbers = all(re.fullmatch(r"-?(0|[1-9]\d*)", value) for value in values)
    return tuple(sorted(values, key=int if numbers else None))


def _examples(rows: Sequence[Row], data: DataSection, task: Reading, names: tuple[str, ...], split: str) -> Examples:
    roles = task.roles(data.columns)
    empty = {row: column for row, cells in enumerate(rows) if (column := _empty(cells, roles, task))}
    kept = [row for row in range(len(rows)) if row not in empty]
    problems = Problems()
    for role, column in roles.items():
        if not kept:
            problems.add(f"data.columns.{role}", f'no row of the {split} rows has anything in "{empty[0]}"', do="name the right column")
            break
        unfit = ((row, task.unfit(role, rows[row][column])) for row in kept if not _nothing(rows[row][column]))
        if (bad := next(((row, said) for row, said in unfit if said), None)) is not None:
            problems.add(f"data.columns.{role}", f"row {bad[0] + 1} of the {split} rows {bad[1]}")
    labels = _labels(rows, kept, data, task, names, split, problems)
    problems.raise_if_any()
    there = [rows[row] for row in kept]
    return Examples(
        columns={role: [row[column] for row in there] for role, column in roles.items()},
        labels=labels if labels is None or labels.ndim == 1 else np.where(labels.any(axis=1), labels.argmax(axis=1), len(names)),
        label_names=() if labels is None else names,
        label_sets=labels if labels is not None and labels.ndim == 2 else None,
        clients=_column(there, data.columns, "client"),
        domains=_column(there, data.columns, "domain"),
        rows=np.array(kept, dtype=np.int64) + 1,
        skipped=tuple(f'row {row + 1} of the {split} rows has an empty "{column}"' for row, column in empty.items()),
    )


def _empty(cells: Row, roles: Mapping[str, str], task: Reading) -> str | None:
    """The column of a row that should hold something and does not."""
    return next((column for role, column in roles.items() if role not in task.may_be_empty and _nothing(cells[column])), None)


def _nothing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _labels(
    rows: Sequence[Row], kept: Sequence[int], data: DataSection, task: Reading, names: tuple[str, ...], split: str, problems: Problems
) -> NDArray[Any] | None:
    """[examples], or with label sets [examples, classes]; None where the data has no labels and needs none."""
    label = data.columns.label
    if not task.needs_labels and label not in rows[0]:
        return None
    codes = {name: code for code, name in enumerate(names)}
    found = [task.classes(rows[row][label]) for row in kept]
    if (
        bad := next(((row, name) for row, given in zip(kept, found, strict=True) for name in given if name not in codes), None)
    ) is not None:
        problems.add(
            "data.labels" if data.labels else "data.columns.label",
            f"row {bad[0] + 1} of the {split} rows has {_said(bad[1])}",
            ", ".join(names[:20]) + (", ..." if len(names) > 20 else ""),
            "add it to data.labels, or drop the row",
        )
        return None
    if task.needs_labels and len(names) < 2:
        problems.add(
            "data.columns.label",
            f'column "{label}" of {data.name} holds {len(names)} class(es)',
            "two or more",
            "name the column with the classes",
        )
        return None
    if not task.label_sets:
        return np.array([codes[given[0]] for given in found], dtype=np.int64)
    sets = np.zeros((len(found), len(names)), dtype=np.bool_)
    for row, given in enumerate(found):
        sets[row, [codes[name] for name in given]] = True
    return sets


def _said(label: str) -> str:
    return "no label" if label in MISSING else f"the label {label!r}"


def _column(rows: Sequence[Row], columns: Columns, role: str) -> tuple[str, ...] | None:
    column = getattr(columns, role)
    return tuple(str(row[column]) for row in rows) if column is not None and column in rows[0] else None


def _hold_out(examples: Examples, fraction: float, seed: int, purpose: str) -> Corpus:
    """A part of each class's `fraction` for the server, so that rare classes are tested too."""
    labels = np.zeros(len(examples), dtype=np.int64) if examples.labels is None else examples.labels
    generator = seeds.generator(seed, purpose)
    test = [
        generator.permutation(np.flatnonzero(labels == code))[: round(fraction * int((labels == code).sum()))]
        for code in range(int(labels.max()) + 1)
    ]
    held = np.sort(np.concatenate(test))
    if not len(held):
        raise UserError(
            Problem(
                "data.test_fraction",
                f"{fraction} of {len(examples)} examples leaves nothing to test on",
                do="raise it, or name a test split" if purpose == "test_split" else "raise it: the validation part is as large",
            )
        )
    if len(held) == len(examples):
        raise UserError(Problem("data.test_fraction", f"{fraction} of {len(examples)} examples leaves nothing to train on", do="lower it"))
    return Corpus(train=examples.take(np.setdiff1d(np.arange(len(examples)), held)), test=examples.take(held))
