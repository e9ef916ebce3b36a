"""The config: what a run is, in the sections of sections.py. Loading collects every problem before it complains."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from fedpeft import yaml_file
from fedpeft.complaints import Where, explain
from fedpeft.errors import Problems
from fedpeft.lookup import TABLES, Settings, find
from fedpeft.privacy import checks as privacy_checks
from fedpeft.sections import (
    AdapterSection,
    DataSection,
    ModelSection,
    OpenSection,
    PartitionSection,
    PrivacySection,
    Section,
    SimulationSection,
    StrategySection,
    TrainingSection,
)


class Config(Settings):
    """A whole run. Made by `Config.load` or `Config.from_dict`; every field has the quickstart's value unless told otherwise."""

    name: str = Field("quickstart", pattern=r"^[\w.-]+$", description="names the run folder")
    seed: int = Field(0, ge=0, description="every random choice of the run follows from it")
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    adapter: AdapterSection = AdapterSection()
    strategy: StrategySection = StrategySection()
    training: TrainingSection = TrainingSection()
    privacy: PrivacySection | None = Field(None, description="differential privacy; null: none")
    simulation: SimulationSection = SimulationSection()

    @classmethod
    def load(cls, path: str | pathlib.Path | None = None, overrides: Iterable[str] = ()) -> Config:
        """The config in a YAML file (None: the embedded default) with `key=value` overrides such as `strategy.num_rounds=5`.

        Raises UserError with all problems: unknown keys with their nearest neighbour and line, values out of range, names
        that nothing answers to.
        """
        source = "the embedded default" if path is None else str(path)
        data, lines = ({}, {}) if path is None else yaml_file.read(pathlib.Path(path))
        problems = Problems()
        given = {_override(data, override, problems) for override in overrides}

        def where(key: yaml_file.Path) -> str:
            if key in given:
                place = "command line"
            else:
                place = f"{source}, line {lines[key]}" if key in lines else source
            return f"{'.'.join(key)} ({place})"

        return cls._checked(data, where, problems)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Config:
        """A config from plain nested dicts, checked like a file."""
        return cls._checked(dict(data), ".".join, Problems())

    @classmethod
    def _checked(cls, data: dict[str, Any], where: Where, problems: Problems) -> Config:
        """Complete the sections with what they name, validate once, and raise everything found together."""
        sections: dict[str, Any] = {}
        strangers: set[str] = set()  # sections whose name nothing answers to: their further keys cannot be judged
        for key, field in cls.model_fields.items():
            given = data.get(key, {})
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section) and isinstance(given, dict)):
                continue
            section = field.annotation
            for slot, kind in section.named.items():
                name = given.get(slot, section.model_fields[slot].default)
                if not isinstance(name, str):
                    continue  # pydantic will say so
                found = len(problems.found)
                with problems.gather():
                    if issubclass(section, OpenSection) and slot == section.opens:
                        section = section.completed(name, where((key, slot)))
                        sections[key] = (section, Field(default_factory=section))
                    elif name not in TABLES[kind]:  # a row is not imported before it is used
                        find(kind, name, where((key, slot)))
                if len(problems.found) > found:
                    strangers.add(key)
        model = create_model(cls.__name__, __base__=cls, **sections)
        try:
            config = model.model_validate(data)
        except ValidationError as error:
            for detail in error.errors():
                if not (detail["loc"][0] in strangers and detail["type"] == "extra_forbidden"):
                    explain(detail, model, (), where, problems)
        problems.raise_if_any()
        for key, section in config:
            if isinstance(section, OpenSection):
                section.check_together(key, where, problems)
        problems.raise_if_any()
        strategy, adapter = config.strategy.build(), config.adapter.build()
        with problems.gather():
            strategy.check_config(config, adapter)
        with problems.gather():
            privacy_checks.check(config, strategy, adapter)
        problems.raise_if_any()
        return config

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts, defaults included: enough to repeat the run."""
        return {key: section.model_dump(mode="json") if isinstance(section, BaseModel) else section for key, section in self}

    def to_yaml(self) -> str:
        """The same as text."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=120)


def _override(data: dict[str, Any], override: str, problems: Problems) -> yaml_file.Path:
    """Set one `key=value` in `data`; the key's path."""
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        problems.add("command line", f'"{override}" is no override', "key=value with a dotted key", "such as strategy.num_rounds=5")
        return path
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    into = data
    for part in path[:-1]:
        below = into[part] = into.get(part) if into.get(part) is not None else {}
        if not isinstance(below, dict):
            problems.add(f"{key} (command line)", f'"{part}" holds a value and no keys')
            return path
        into = below
    into[path[-1]] = value
    return path
