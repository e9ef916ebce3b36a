"""A run as it is read back from its folder, after the last round: what reports and studies start from.

Reads RUN/summary.json, RUN/rounds.jsonl and RUN/config.yaml; what is missing or damaged is said in one line each.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fedpeft import yaml_file
from fedpeft.errors import Problem, Problems, UserError
from fedpeft.records import RoundRecord

FILES = ("summary.json", "rounds.jsonl", "config.yaml")

SUMMARY_KEYS = frozenset(
    {
        *("name", "strategy", "adapter", "seed", "versions", "rounds_completed", "stopped_because", "rejected_updates"),
        *("primary_metric", "metrics", "initial", "best", "privacy", "seconds", "bytes_up", "bytes_down"),
        *("trainable_parameters", "base_parameters"),
    }
)


@dataclass(frozen=True)
class Run:
    """What a finished run left behind."""

    folder: pathlib.Path
    summary: Mapping[str, Any]
    rounds: tuple[RoundRecord, ...]  # round 0, measured before training, comes first
    config: Mapping[str, Any]

    @property
    def primary_metric(self) -> str:
        """The metric that says how good the run is; the others explain it."""
        return str(self.summary["primary_metric"])

    @property
    def higher_is_better(self) -> bool:
        """Whether that metric grows as the model gets better."""
        return bool(self.summary.get("higher_is_better", True))


def read_run(folder: pathlib.Path) -> Run:
    """The run in `folder`. Raises UserError when the folder holds none, or what it holds cannot be read."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(_no_run(folder, missing))
    lines = _text(folder / "rounds.jsonl").splitlines()
    places = [(f"{folder / 'rounds.jsonl'}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return Run(
        folder,
        _summary(folder / "summary.json"),
        tuple(_round(_parsed(line, where), where) for where, line in places),
        yaml_file.read(folder / "config.yaml")[0],
    )


def read_runs(folders: Iterable[pathlib.Path]) -> list[Run]:
    """The runs in the folders, each once. Raises UserError with what is wrong with every one of them."""
    problems = Problems()
    runs = {}
    for folder in folders:
        with problems.gather():
            runs[folder.resolve()] = read_run(folder)
    problems.raise_if_any()
    return list(runs.values())


def labels(runs: Sequence[Run]) -> list[str]:
    """A name for each run that tells it from the others: the config's name, else the folder's, else the whole path."""
    candidates: list[list[str]] = [
        [str(run.summary["name"]) for run in runs],
        [run.folder.resolve().name for run in runs],
        [str(run.folder.resolve()) for run in runs],
    ]
    return next((names for names in candidates if len(set(names)) == len(runs)), candidates[-1])


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings in which the runs differ: dotted key -> its value in each run, "-" where a run has no such key."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = {
        key: [json.dumps(one[key], ensure_ascii=False, default=str) if key in one else "-" for one in flat] for key in keys if key != "name"
    }
    return {key: [value.strip('"') for value in values] for key, values in rows.items() if len(set(values)) > 1}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves.update(_flat(value, f"{above}{key}.") if isinstance(value, Mapping) and value else {f"{above}{key}": value})
    return leaves


def _no_run(folder: pathlib.Path, missing: list[str]) -> Problem:
    allowed = f"a folder with {', '.join(FILES)}"
    if not folder.is_dir():
        return Problem(str(folder), "is no folder", allowed, "give the folder that a run was written to (--out)")
    if len(missing) == len(FILES):
        return Problem(str(folder), "is no run folder", allowed, "give the folder that a run was written to (--out)")
    return Problem(str(folder), f"has no {', '.join(missing)}", allowed, "the run has not finished: continue it with --resume")


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(str(path), f"cannot be read ({error})")) from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(Problem(where, f"is no JSON ({error})", do="the file was damaged after the run; run it again")) from error
    if not isinstance(value, dict):
        raise UserError(Problem(where, f"holds a {type(value).__name__}", "a JSON object"))
    return value


def _summary(path: pathlib.Path) -> dict[str, Any]:
    summary = _parsed(_text(path), str(path))
    absent = sorted(SUMMARY_KEYS - summary.keys())
    if absent:
        raise UserError(Problem(str(path), f"has no {', '.join(absent)}", do="it was written by another version; run it again"))
    return summary


def _round(line: dict[str, Any], where: str) -> RoundRecord:
    known = {field.name: field for field in fields(RoundRecord)}
    needed = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    absent = sorted(needed - line.keys())
    if absent:
        raise UserError(Problem(where, f"has no {', '.join(absent)}", do="it was written by another version; run it again"))
    return RoundRecord(**{name: value for name, value in line.items() if name in known})
