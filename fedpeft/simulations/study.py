"""`run`: a study, cell by cell, each cell a run of `simulate` in a folder of its own.

    DIR/study.yaml             what the study is; the same command goes on with it, another study is refused
    DIR/tune/ARM/CANDIDATE/    runs on the validation split, at the study's first seed
    DIR/cells/ARM/seed-N/      the runs; failed.txt says why one failed
    DIR/results.csv ...        what it came to: study_tables.py, study_picture.py

A finished cell is kept, an interrupted one goes on after its last whole round, a failed one starts again.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedpeft import yaml_file
from fedpeft.config import Config
from fedpeft.errors import FedpeftError, Problem, RunStopped, UserError
from fedpeft.intervals import best
from fedpeft.quiet import quiet_libraries
from fedpeft.records import RoundRecord
from fedpeft.runs import Run, read_run
from fedpeft.screen import Facts, Screen, choose
from fedpeft.server.federation import FINISHED
from fedpeft.server.run_folder import RunFolder
from fedpeft.simulations import study_epsilon
from fedpeft.simulations.assemble import deal
from fedpeft.simulations.run import simulate
from fedpeft.simulations.study_picture import draw
from fedpeft.simulations.study_plan import Arm, Candidate, Study, by_arm
from fedpeft.simulations.study_results import Cell, Results, Trial
from fedpeft.simulations.study_tables import write_tables
from fedpeft.units import headline, one_line

FAILED = "failed.txt"  # its first line is the reason
TOLD = 5  # rows of a run's headline that fit into one line

Picked = Mapping[str, Candidate | None]
"""Arm -> the candidate that its cells are run with; None when every candidate failed."""


def run(study: Study, out: pathlib.Path, target: float | None = None, json: bool = False) -> Results:
    """Bring every cell of the study in `out` to its end, and write the tables and the picture.

    A cell that fails is recorded as failed, and the others go on. Raises UserError, before anything runs, when `out` holds
    something else, or the data of an arm cannot be read or dealt out.
    """
    _check_folder(study, out)
    _check_data(study)
    out.mkdir(parents=True, exist_ok=True)
    beside = out / "study.new"
    beside.write_text(yaml.safe_dump(study.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(beside, out / "study.yaml")
    picked: dict[str, Candidate | None] = {}
    trials: list[Trial] = []
    for arm in study.arms:
        picked[arm.name], tried = _tune(arm, out, json)
        trials += tried
    cells = [(arm, seed) for seed in study.numbers for arm in study.arms]  # every arm at the first seed before the second
    if kept := sum(_stands(_folder(out, arm, seed))[0] is not None for arm, seed in cells):
        _say(f"{kept} of {len(cells)} cells are finished already", json)
    for number, (arm, seed) in enumerate(cells, 1):
        folder, candidate = _folder(out, arm, seed), picked[arm.name]
        if candidate is None:
            _fail(folder, "no candidate of --tune finished")
        elif _settle(_config(arm, candidate, seed), folder, f"cell {number} of {len(cells)}, {arm.name}, seed {seed}", json):
            write_tables(_results(study, out, picked, trials, target), out)
    results = _results(study, out, picked, trials, target)
    write_tables(results, out)
    draw(results, out / "study.png")
    if costs := study_epsilon.costs(results):
        study_epsilon.draw(costs, results.metric, out / "epsilon.png")
    return results


def _check_folder(study: Study, out: pathlib.Path) -> None:
    """`out` is free, or holds this study. More seeds may be added to it."""
    kept = out / "study.yaml"
    if not kept.is_file():
        if out.exists() and not (out.is_dir() and set(os.listdir(out)) <= {"study.new"}):
            raise UserError(Problem("--out", f"{out} is there and holds no study", do="name another folder"))
        return
    then, now = yaml_file.read(kept)[0], study.as_dict()
    if not now.keys() <= then.keys():
        raise UserError(Problem("--out", f"{kept} is not that of a study", do="name another folder"))
    changed = [f"--{option}" for option, key in (("vary", "arms"), ("tune", "tune")) if _settings_in(then[key]) != _settings_in(now[key])]
    if not changed:
        pairs = [(Config.from_dict(old["config"]).as_dict(), new["config"]) for old, new in zip(then["arms"], now["arms"], strict=True)]
        changed += sorted({section for old, new in pairs for section in new if old[section] != new[section]})
    if changed:
        raise UserError(Problem("--out", f"{out} holds a study with another {', '.join(changed)}", do="name another folder"))


def _settings_in(entries: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [entry.get("settings", entry) for entry in entries]


def _check_data(study: Study) -> None:
    """The data of every arm can be read and dealt out at the first seed, as it is and for tuning."""
    found: dict[str, frozenset[Problem]] = {}
    complaints = []
    for arm in study.arms:
        configs = [candidate.config for candidate in arm.candidates]
        for config in configs + ([_on_validation(config) for config in configs] if len(configs) > 1 else []):
            key = yaml.safe_dump([config.as_dict()[section] for section in ("model", "data", "partition")])
            if key not in found:
                found[key] = _data_problems(config)
            complaints.append((arm.name, found[key]))
    if problems := by_arm(complaints):
        raise UserError(*problems)


def _data_problems(config: Config) -> frozenset[Problem]:
    try:
        with quiet_libraries():
            deal(config)
    except UserError as error:
        return frozenset(error.problems)
    return frozenset()


def _tune(arm: Arm, out: pathlib.Path, json: bool) -> tuple[Candidate | None, list[Trial]]:
    """The candidate that does best on the validation split at the first seed, the first of equals; and how all did.

    The pick stands once all have been tried: a candidate that failed is tried again only when all failed.
    """
    if len(arm.candidates) == 1:
        return arm.candidates[0], []
    folders = [out / "tune" / arm.name / candidate.name for candidate in arm.candidates]
    stands = [_stands(folder) for folder in folders]
    if not all(run or reason for run, reason in stands) or not any(run for run, _ in stands):
        for candidate, folder in zip(arm.candidates, folders, strict=True):
            config = _on_validation(candidate.config).model_copy(update={"name": f"{arm.name}_{candidate.name}"})
            _settle(config, folder, f"tuning {arm.name}, {candidate.name}", json)
        stands = [_stands(folder) for folder in folders]
    cells = [
        Cell(arm.name, candidate.settings, candidate.config.seed, run, reason)
        for candidate, (run, reason) in zip(arm.candidates, stands, strict=True)
    ]
    scores = {index: cell.result("final") for index, cell in enumerate(cells) if cell.run}
    higher = all(cell.run.higher_is_better for cell in cells if cell.run)
    top = best(scores, higher) if scores else None
    return None if top is None else arm.candidates[top], [Trial(cell, index == top) for index, cell in enumerate(cells)]


def _settle(config: Config, folder: pathlib.Path, title: str, json: bool) -> bool:
    """Bring the run in `folder` to its end or to its failure; False when it was finished already."""
    kept, reason = _stands(folder)
    if kept is not None:
        if Config.from_dict(kept.config).as_dict() != config.as_dict():
            raise UserError(Problem(str(folder), "holds a run with another config", do="delete that folder, and the cell is run again"))
        return False
    if reason or not RunFolder(folder).checkpoint.is_dir():  # nothing that a run could go on from
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with choose(json) if json else _Brief(choose(json), title) as screen:
            summary = simulate(config, folder, resume=folder.exists(), screen=screen).summary
        if summary["stopped_because"] != FINISHED:
            raise RunStopped(summary["stopped_because"])
    except Exception as error:  # a strategy or a data source of the person's own may raise anything: it costs its cell, not the study
        ours = isinstance(error, FedpeftError)
        reason = str(error) if ours else f"{type(error).__name__}: {error}"
        _fail(folder, reason, "" if ours else traceback.format_exc())
        _say(f"{title}: failed: {reason}", json)
    return True


def _say(text: str, json: bool) -> None:
    with choose(json) as screen:
        screen.note(text)


def _fail(folder: pathlib.Path, reason: str, details: str = "") -> None:
    """Leave word of why there is no finished run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).write_text(f"{one_line(reason)}\n{details}", encoding="utf-8")


def _stands(folder: pathlib.Path) -> tuple[Run | None, str]:
    """The finished run in `folder`, or why it failed; neither when it has not ended."""
    if (folder / FAILED).is_file():
        return None, (folder / FAILED).read_text(encoding="utf-8").partition("\n")[0] or "failed"
    if not RunFolder(folder).summary.is_file():
        return None, ""
    run = read_run(folder)
    stopped = run.summary["stopped_because"]
    return (run, "") if stopped == FINISHED else (None, stopped)


def _results(study: Study, out: pathlib.Path, picked: Picked, trials: Sequence[Trial], target: float | None) -> Results:
    """Everything as it lies on disk now."""
    cells = []
    for arm in study.arms:
        candidate = picked[arm.name]
        settings = {**arm.settings, **(candidate.settings if candidate else {})}
        cells += [Cell(arm.name, settings, seed, *_stands(_folder(out, arm, seed))) for seed in study.numbers]
    return Results(study.name, cells, trials, target)


def _folder(out: pathlib.Path, arm: Arm, seed: int) -> pathlib.Path:
    return out / "cells" / arm.name / f"seed-{seed}"


def _config(arm: Arm, candidate: Candidate, seed: int) -> Config:
    return candidate.config.model_copy(update={"name": arm.name, "seed": seed})


def _on_validation(config: Config) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"evaluate_on": "validation"})})


class _Brief(Screen):
    """One run among many: its rounds as another screen shows them, and a single line at its end."""

    def __init__(self, inner: Screen, title: str) -> None:
        self.inner, self.title = inner, title

    def __exit__(self, *reason: object) -> None:
        self.inner.__exit__(*reason)

    def started(self, config: Config, facts: Facts) -> None:
        self.inner.started(config, facts)

    def round_done(self, record: RoundRecord, num_rounds: int) -> None:
        self.inner.round_done(record, num_rounds)

    def note(self, text: str) -> None:
        self.inner.note(text)

    def finished(self, summary: Mapping[str, Any], out: pathlib.Path) -> None:
        said = "; ".join(f"{name} {value}" for name, value in headline(summary)[:TOLD])
        self.inner.note(f"{self.title}: {said}")
