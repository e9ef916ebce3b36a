"""A client's own file: where its data lies, and what it will do for a server. The data owner's word is final.

    data: {name: patients.csv, columns: {text: report, label: finding}}
    limits: {models: [minilm], max_steps: 100, max_rounds: 50, privacy: {max_epsilon: 3}}

Whatever a server asks for beyond the limits is refused, with the reason said on both sides.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, ValidationError

from fedpeft import base, lookup, yaml_file
from fedpeft.config import Config
from fedpeft.data import corpus
from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, Problems, UserError
from fedpeft.lookup import Settings, find
from fedpeft.privacy import planning
from fedpeft.sections import ModelSection
from fedpeft.training.job import local_steps
from fedpeft.training.prepare import plans


class LeastPrivacy(Settings):
    """The least privacy that a run must give this client's data."""

    max_epsilon: float = Field(gt=0, description="largest epsilon of a run, over all its rounds")
    max_delta: float = Field(1e-5, gt=0, lt=1, description="largest delta")
    unit: Literal["example", "client"] = Field(
        "example", description="example: noise is added here, against the server too; client: the server is trusted to add it"
    )


class Limits(Settings):
    """What a server may ask for."""

    models: list[str] | dict[str, str] = Field(
        ["minilm"], description="base models that may be trained on; with values: where a model of that name lies on this machine"
    )
    task: str = Field("sequence-classification", description="what the data may be used for")
    max_steps: int = Field(1000, ge=1, description="most local steps in a round; accumulated batches count as steps")
    max_rounds: int = Field(
        100, ge=1, description="most answers to training in a run, counted on this machine; a round that is asked for again counts again"
    )
    surveys: bool = Field(True, description="answer surveys before round 1: sums over the data, such as counts of the classes")
    privacy: LeastPrivacy | None = Field(
        None, description="least privacy of a run, as {max_epsilon: 3, max_delta: 1.0e-5, unit: example}; null: none is asked for"
    )
    task_settings: dict[str, Any] = Field({}, description="settings of the task that your rows need to be read, such as multi_label")


class OwnFile(Settings):
    """The file, read and checked."""

    data: dict[str, Any] = Field(description="as the data section of a config")
    limits: Limits = Limits()
    device: str = Field("auto", description='"auto", "cpu", "cuda": where this client trains')
    patience: float = Field(3600.0, gt=0, description="seconds without a server after which the client gives up")


@dataclass(frozen=True)
class Agreed:
    """A task that is within the limits, as this client runs it."""

    run: str  # the run it belongs to
    config: Config
    examples: Examples
    clients: int  # in the whole federation


def load(path: pathlib.Path) -> OwnFile:
    """Read the file and check everything that can be checked without a server: rows, columns, labels, models, device. Raises UserError."""
    given, lines = yaml_file.read(path)
    levels: list[type[Settings]] = [OwnFile, Limits, LeastPrivacy]
    problems = Problems()
    try:
        own = OwnFile.model_validate(given)
    except ValidationError as error:
        for detail in error.errors():
            at = tuple(str(part) for part in detail["loc"])
            line = f", line {lines[at]}" if at in lines else ""
            known = levels[min(len(at), len(levels)) - 1]
            allowed = ", ".join(known.model_fields) if detail["type"] == "extra_forbidden" else ""
            problems.add(f"{'.'.join(at)} ({path}{line})", detail["msg"].lower(), allowed)
        problems.raise_if_any()
    with problems.gather():
        model = {**own.limits.task_settings, "task": own.limits.task}
        config = Config.from_dict({"data": own.data, "model": model, "training": {"device": own.device}})
        _read_examples(config, None)
        base.choose_device(config.training)
    task = find("task", own.limits.task)(**own.limits.task_settings)
    for place in _places(own.limits).values():
        with problems.gather():
            base.skeleton(ModelSection(name=place, task=own.limits.task), task, 2)
    problems.raise_if_any()
    return own


def agree(own: OwnFile, said: dict[str, Any]) -> Agreed:
    """The task of a join message as this client runs it. Raises UserError with every reason why it does not."""
    run, labels, clients = said["run"], [str(label) for label in said["labels"]], int(said["clients"])
    with lookup.only_installed():  # a name such as "file.py:function" would run what the server names
        asked = Config.from_dict(said["config"])
    limits, problems = own.limits, Problems()
    places = _places(limits)
    if asked.model.name not in places:
        problems.add("limits.models", f'the server wants to train "{asked.model.name}"', ", ".join(places))
    if asked.model.task != limits.task:
        problems.add("limits.task", f'the server wants {asked.model.task} "{asked.model.task}"', limits.task)
    if asked.strategy.num_rounds > limits.max_rounds:
        problems.add("limits.max_rounds", f"the server wants {asked.strategy.num_rounds} rounds", f"at most {limits.max_rounds}")
    problems.raise_if_any()
    mine = {key: value for key, value in own.data.items() if key not in ("max_length", "validation_fraction")}
    shared = {"max_length": asked.data.max_length, "validation_fraction": asked.data.validation_fraction}
    sections = asked.as_dict()
    config = Config.from_dict(
        {
            **sections,
            "data": {**mine, **shared},
            "model": {**sections["model"], "name": places[asked.model.name]},
            "training": {**sections["training"], "device": own.device},
        }
    )
    examples = _read_examples(config, labels)
    if (steps := local_steps(config, len(examples)) * config.training.gradient_accumulation_steps) > limits.max_steps:
        raise UserError(Problem("limits.max_steps", f"the server wants {steps} local steps a round", f"at most {limits.max_steps}"))
    if limits.privacy is not None:
        config = _private_enough(config, limits.privacy, len(examples), clients)
    return Agreed(str(run), config, examples, clients)


def _private_enough(config: Config, least: LeastPrivacy, examples: int, clients: int) -> Config:
    """The config, with a budget that ends this client's part where `least` would be broken. Raises UserError when it would be anyway."""
    section, where = config.privacy, "limits.privacy"
    if section is None:
        raise UserError(Problem(where, "the server wants to train without differential privacy", f"epsilon {least.max_epsilon:g} at most"))
    if section.unit != least.unit:
        raise UserError(Problem(f"{where}.unit", f"the server protects each {section.unit}", f"each {least.unit}"))
    if section.insecure_seed is not None:
        raise UserError(Problem(where, "the server wants seeded noise, which it can take off again", "noise of this machine's own"))
    if section.of_clients:
        plan = planning.client_plan(section, clients, config.strategy.fraction_train, config.strategy.num_rounds)
    else:
        (plan,) = plans(config, {"here": examples})
    problems = Problems()
    if plan.delta > least.max_delta:
        problems.add(f"{where}.max_delta", f"the server wants delta {plan.delta:.3g}", f"at most {least.max_delta:g}")
    if (epsilon := min(plan.epsilon, plan.budget or math.inf)) > least.max_epsilon:
        rounds = config.strategy.num_rounds
        problems.add(f"{where}.max_epsilon", f"{rounds} rounds would cost epsilon {epsilon:.4g}", f"at most {least.max_epsilon:g}")
    problems.raise_if_any()
    if section.noise_multiplier is None or section.of_clients:  # solved for a target within the limit; or the server's to keep
        return config
    budget = min(section.target_epsilon or math.inf, least.max_epsilon)
    return config.model_copy(update={"privacy": section.model_copy(update={"target_epsilon": budget})})


def _read_examples(config: Config, labels: Sequence[str] | None) -> Examples:
    return corpus.held_by_client(config.data, config.model.build(), labels or config.data.labels)


def _places(limits: Limits) -> dict[str, str]:
    """The name a server may use -> where the model lies here."""
    return limits.models if isinstance(limits.models, dict) else {name: name for name in limits.models}
