"""From a source's rows to what the run works on: checked `Examples`, a train part to deal out and a test part for the server."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpeft import seeds
from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, Problems, UserError
from fedpeft.sections import Columns, DataSection

Row = Mapping[str, Any]
MISSING = frozenset({"", "None"})  # how a label that is not there looks as text


@dataclass(frozen=True)
class Corpus:
    """The data of a run, before it is dealt out."""

    train: Examples  # dealt to the clients
    test: Examples  # stays with the server, which evaluates on it: the test part, or the validation part


def load(data: DataSection, roles: Mapping[str, str], seed: int) -> Corpus:
    """Read the source that `data` names, check every row, and split off the test part, or a validation part beside it.

    `roles` maps what the task reads ("text") to the column that holds it. Raises UserError for missing columns, rows that
    are not text, and labels outside the set, each with the row.
    """
    splits = _rows(data)
    if data.max_examples is not None and data.max_examples < len(splits["train"]):
        kept = np.sort(seeds.generator(seed, "max_examples").choice(len(splits["train"]), data.max_examples, replace=False))
        splits = {**splits, "train": [splits["train"][row] for row in kept]}
    for split, rows in splits.items():
        _check_columns(rows, data, roles, split)
    names = tuple(data.labels) if data.labels else _label_names(splits["train"], data.columns.label)
    parts = {split: _examples(rows, data, roles, names, split) for split, rows in splits.items()}
    if "test" in parts:
        corpus = Corpus(parts["train"], parts["test"])
    else:
        corpus = _hold_out(parts["train"], data.test_fraction, seed, "test_split")
    if data.evaluate_on == "validation":  # what is set aside for the test neither trains nor evaluates
        return _hold_out(corpus.train, data.test_fraction, seed, "validation_split")
    return corpus


def held_by_server(data: DataSection, roles: Mapping[str, str], seed: int) -> Examples:
    """What a server evaluates on when its clients hold the training examples: the test part, as in a simulation, or with
    `test_fraction` 0 and no test split everything that `data` names."""
    if data.test_fraction == 0 and "test" not in (rows := _rows(data)):
        return _checked(rows["train"], data, roles, data.labels, "test")
    return load(data, roles, seed).test


def held_by_client(data: DataSection, roles: Mapping[str, str], labels: Sequence[str] | None) -> Examples:
    """What a client trains on: all the rows that its own `data` section names. Its labels must be among `labels`, if given."""
    return _checked(_rows(data)["train"], data, roles, labels, "train")


def _checked(rows: Sequence[Row], data: DataSection, roles: Mapping[str, str], labels: Sequence[str] | None, split: str) -> Examples:
    _check_columns(rows, data, roles, split)
    return _examples(rows, data, roles, tuple(labels) if labels else _label_names(rows, data.columns.label), split)


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


def _check_columns(rows: Sequence[Row], data: DataSection, roles: Mapping[str, str], split: str) -> None:
    there = set(rows[0])
    problems = Problems()
    wanted = {f"data.columns.{role}": column for role, column in {**roles, "label": data.columns.label}.items()}
    for key in ("client", "domain"):  # used when there, asked for only when the config names another than the usual one
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
    for number, row in enumerate(rows, 1):
        if not problems.found and (lost := [column for column in wanted.values() if column not in row]):
            problems.add("data.name", f'row {number} of the {split} rows of {data.name} has no "{lost[0]}"')
    problems.raise_if_any()


def _label_names(rows: Sequence[Row], column: str) -> tuple[str, ...]:
    """The classes that occur: numbers in their order, anything else by name."""
    values = {str(row[column]) for row in rows} - MISSING
    numbers = all(re.fullmatch(r"-?(0|[1-9]\d*)", value) for value in values)
    return tuple(sorted(values, key=int if numbers else None))


def _examples(rows: Sequence[Row], data: DataSection, roles: Mapping[str, str], names: tuple[str, ...], split: str) -> Examples:
    codes = {name: code for code, name in enumerate(names)}
    problems = Problems()
    for role, column in roles.items():
        if (bad := next((row for row, cells in enumerate(rows) if not isinstance(cells[column], str)), None)) is not None:
            problems.add(f"data.columns.{role}", f"row {bad + 1} of the {split} rows holds {rows[bad][column]!r} where a text should be")
    label = data.columns.label
    if (bad := next((row for row, cells in enumerate(rows) if str(cells[label]) not in codes), None)) is not None:
        problems.add(
            "data.labels" if data.labels else "data.columns.label",
            f"row {bad + 1} of the {split} rows has {_said(rows[bad][label])}",
            ", ".join(names[:20]) + (", ..." if len(names) > 20 else ""),
            "add it to data.labels, or drop the row",
        )
    if len(names) < 2:
        problems.add(
            "data.columns.label",
            f'column "{label}" of {data.name} holds {len(names)} class(es)',
            "two or more",
            "name the column with the classes",
        )
    problems.raise_if_any()
    return Examples(
        columns={role: [row[column] for row in rows] for role, column in roles.items()},
        labels=np.array([codes[str(row[label])] for row in rows], dtype=np.int64),
        label_names=names,
        clients=_column(rows, data.columns, "client"),
        domains=_column(rows, data.columns, "domain"),
    )


def _said(label: Any) -> str:
    return "no label" if str(label) in MISSING else f"the label {str(label)!r}"


def _column(rows: Sequence[Row], columns: Columns, role: str) -> tuple[str, ...] | None:
    column = getattr(columns, role)
    return tuple(str(row[column]) for row in rows) if column is not None and column in rows[0] else None


def _hold_out(examples: Examples, fraction: float, seed: int, purpose: str) -> Corpus:
    """A part of each class's `fraction` for the server, so that rare classes are tested too."""
    assert examples.labels is not None
    generator = seeds.generator(seed, purpose)
    test = [
        generator.permutation(np.flatnonzero(examples.labels == code))[: round(fraction * int((examples.labels == code).sum()))]
        for code in range(len(examples.label_names))
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
