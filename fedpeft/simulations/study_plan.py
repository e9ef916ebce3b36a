"""What a study is: arms, each a combination of settings, every one of them checked before anything runs.

    --vary strategy.name=fedavg,ffa_lora --vary partition.alpha=0.1,0.5      4 arms: every combination, the last key fastest
    --vary "strategy={name: krum, over: ffa_lora},{name: fedavg}"            2 arms: keys of a section that change together
    --tune training.learning_rate=1e-3,1e-2                                  2 candidates in every arm, one of which is picked

A value is YAML, as in an override. The first arm is the one that the others are compared with.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fedpeft.config import Config
from fedpeft.errors import Problem, Problems, UserError

Settings = dict[str, str]
"""Dotted key -> value as YAML text: what an override sets."""

Axis = list[Settings]
"""The values that one --vary or --tune goes through."""

OWN_KEYS = {"seed": "give --seeds", "name": "it is the arm's", "data.evaluate_on": "--tune sees to it"}
FOLDER_NAME_LENGTH = 80
CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Candidate:
    """An arm with one choice of the tuned settings; without --tune an arm has one candidate, which sets nothing."""

    name: str
    settings: Settings
    config: Config


@dataclass(frozen=True)
class Arm:
    """One combination of the varied settings."""

    name: str
    settings: Settings
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Study:
    """Arms x seeds. The seeds of the cells are the config's own and those after it."""

    name: str
    arms: tuple[Arm, ...]
    seeds: int

    @property
    def numbers(self) -> range:
        """The seeds themselves."""
        first = self.arms[0].candidates[0].config.seed
        return range(first, first + self.seeds)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts: what study.yaml holds."""
        tune = [candidate.settings for candidate in self.arms[0].candidates]
        arms = [{"name": arm.name, "settings": arm.settings, "config": arm.candidates[0].config.as_dict()} for arm in self.arms]
        return {"name": self.name, "seeds": self.seeds, "tune": tune if tune != [{}] else [], "arms": arms}


def plan(
    path: str | None, overrides: Sequence[str] = (), vary: Sequence[str | Axis] = (), tune: Sequence[str | Axis] = (), seeds: int = 1
) -> Study:
    """The study of the config in `path` (None: the embedded default) with `overrides`.

    An axis that is not text may change keys of several sections together: [{"strategy.name": "fedavg", "seed": "1"}, ...].
    Raises UserError with the problems of all arms: what the config does not allow, a setting that two options give, arms
    that are the same.
    """
    problems = Problems()
    if seeds < 1:
        problems.add("--seeds", f"{seeds} leaves nothing to run", "1 or more")
    varied, tuned = (
        [_axis(option, axis, problems) if isinstance(axis, str) else axis for axis in axes]
        for option, axes in (("--vary", vary), ("--tune", tune))
    )
    _check_keys(varied, tuned, problems)
    problems.raise_if_any()
    settings, choices = _combinations(varied), _combinations(tuned)
    arms = _load(path, overrides, settings, choices, problems)
    _check_distinct(arms, bool(tune), problems)
    problems.raise_if_any()
    return Study(arms[0].candidates[0].config.name, arms, seeds)


def _axis(option: str, text: str, problems: Problems) -> Axis:
    """The settings that `key=value,value` goes through, one dict a value."""
    key, equals, values = text.partition("=")
    if not equals or not key:
        problems.add(option, f'"{text}" names nothing to go through', "key=value,value", "such as strategy.name=fedavg,ffa_lora")
        return []
    pieces = split_values(values)
    if pieces is None:
        problems.add(option, f'"{text}" opens a bracket or a quote that it does not close')
    elif not all(pieces):
        problems.add(option, f'"{text}" has an empty value', do="drop the comma, or say null")
    return [_settings(key, piece) for piece in pieces or []]


def split_values(text: str) -> list[str] | None:
    """The values in `text`, cut at commas outside brackets, braces and quotes; None when one of these is left open.

    >>> split_values("fedavg, [query, value],{name: krum, over: ffa_lora},'a,b'")
    ['fedavg', '[query, value]', '{name: krum, over: ffa_lora}', "'a,b'"]
    """
    pieces, open_until, previous = [""], "", ","
    for letter in text:
        if letter == "," and not open_until:
            pieces.append("")
        else:
            pieces[-1] += letter
        if open_until and letter == open_until[-1]:
            open_until = open_until[:-1]
        elif open_until[-1:] not in ("'", '"'):
            if letter in "'\"" and previous in "[{,:":  # elsewhere it is an apostrophe
                open_until += letter
            elif letter in CLOSING:
                open_until += CLOSING[letter]
        previous = previous if letter.isspace() else letter
    return None if open_until else [piece.strip() for piece in pieces]


def _settings(key: str, text: str) -> Settings:
    """What one value sets: itself, or, for a mapping given to a whole section, the keys in it; the section keeps its others."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if not isinstance(value, dict) or key not in Config.model_fields:
        return {key: text}
    return {f"{key}.{part}": _flow(below) for part, below in value.items()}


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _check_keys(varied: Sequence[Axis], tuned: Sequence[Axis], problems: Problems) -> None:
    """Every key belongs to one option, and to the person."""
    keys = [(option, {key for item in axis for key in item}) for option, axes in (("--vary", varied), ("--tune", tuned)) for axis in axes]
    counted = Counter(key for _, there in keys for key in there)
    for key, count in sorted(counted.items()):
        option = next(option for option, there in keys if key in there)
        if count > 1:
            problems.add(option, f"{key} is given {count} times", do="give all its values in one option")
        if key in OWN_KEYS:
            problems.add(option, f"{key} is the study's own to set", do=OWN_KEYS[key])


def _combinations(axes: Sequence[Axis]) -> list[Settings]:
    return [{key: value for item in items for key, value in item.items()} for items in itertools.product(*axes)]


def _load(
    path: str | None, overrides: Sequence[str], settings: Sequence[Settings], choices: Sequence[Settings], problems: Problems
) -> tuple[Arm, ...]:
    """Every arm with every candidate. A problem that all have is said once; another names its arm."""
    arms: list[Arm] = []
    complaints: list[tuple[str, frozenset[Problem]]] = []
    for name, setting in _named(settings, "base"):
        candidates = []
        for choice_name, choice in _named(choices, "as it is"):
            given = [*overrides, *(f"{key}={value}" for key, value in {**setting, **choice}.items())]
            try:
                candidates.append(Candidate(choice_name, choice, Config.load(path, given)))
                complaints.append((name, frozenset()))
            except UserError as error:
                complaints.append((name, frozenset(error.problems)))
        arms.append(Arm(name, setting, tuple(candidates)))
    problems.found.extend(by_arm(complaints))
    return tuple(arms)


def by_arm(complaints: Sequence[tuple[str, frozenset[Problem]]]) -> list[Problem]:
    """From (arm, its problems): what all arms have is said once, anything else with the arm's name."""
    everywhere = functools.reduce(frozenset.__and__, (found for _, found in complaints))
    others = dict.fromkeys((name, problem) for name, found in complaints for problem in sorted(found - everywhere, key=str))
    named = [Problem(f"arm {name}: {problem.where}", problem.got, problem.allowed, problem.do) for name, problem in others]
    return [*sorted(everywhere, key=str), *named]


def _named(settings: Sequence[Settings], fallback: str) -> list[tuple[str, Settings]]:
    """Each with a name that can be a folder: its values, with the last part of the key where it is not `name`."""
    named: dict[str, Settings] = {}
    for setting in settings:
        words = [_word(value) if key.endswith(".name") else f"{key.rpartition('.')[2]}-{_word(value)}" for key, value in setting.items()]
        name = "_".join(words)[:FOLDER_NAME_LENGTH].strip("-.") or fallback
        free = (numbered for numbered in (name, *(f"{name}-{number}" for number in range(2, len(settings) + 1))) if numbered not in named)
        named[next(free)] = setting
    return list(named.items())


def _word(value: str) -> str:
    """What is left of a value in the name of a folder: letters, digits, dots and dashes."""
    return "-".join(re.sub(r"[^\w.-]", " ", value.replace("+", "")).split())


def _check_distinct(arms: Sequence[Arm], tuned: bool, problems: Problems) -> None:
    """No two arms are one and the same, and what --tune looks at is not what the arms are judged by."""
    seen: dict[str, str] = {}
    for arm in arms:
        for candidate in arm.candidates:
            title = arm.name if not tuned else f"{arm.name} with {candidate.name}"
            text = candidate.config.to_yaml()
            if text in seen:
                problems.add("--tune" if tuned else "--vary", f"{seen[text]} and {title} are the same run", do="drop one of them")
            seen[text] = title
        if tuned and any(candidate.config.data.evaluate_on != "test" for candidate in arm.candidates):
            problems.add("--tune", "data.evaluate_on=validation would judge by what --tune picks by", do="leave data.evaluate_on out")
            return
