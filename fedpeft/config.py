"""The config: what a run is, in sections whose defaults are the quickstart (`configs/quickstart.yaml` says them aloud).

A section with a `name` takes the settings of what it names (`lookup.py`) as further keys: `partition: {name: dirichlet,
alpha: 0.3}` gives alpha to `data/partitions/dirichlet.py`. Loading collects every problem before it complains.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from fedpeft import yaml_file
from fedpeft.errors import Problems, nearest
from fedpeft.lookup import TABLES, Settings, find, settings_of

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


Where = Callable[[yaml_file.Path], str]
"""Says where a key was set: file and line, or the command line."""


class Section(Settings):
    """A section of the config. `named` maps a key that holds a name to the table it is looked up in."""

    named: ClassVar[Mapping[str, str]] = {}


class OpenSection(Section):
    """A section whose further keys are the settings of what its `name` names."""

    fallback: ClassVar[str | None] = None  # what answers to a name that no table holds
    own_keys: ClassVar[frozenset[str]]  # set on a completed class: the keys that are the section's and not the named thing's
    name: str

    @classmethod
    def completed(cls, name: str, where: str) -> type[OpenSection]:
        """This section with the settings of what `name` names as further fields."""
        model = settings_of(find(cls.named["name"], name, where, cls.fallback))
        fields: dict[str, Any] = {key: (field.annotation, field) for key, field in model.model_fields.items()}
        section = create_model(cls.__name__, __base__=cls, **fields)
        section.own_keys = frozenset(cls.model_fields)
        return section

    @property
    def settings(self) -> dict[str, Any]:
        """The validated settings of what `name` names, defaults filled in."""
        return {key: getattr(self, key) for key in type(self).model_fields if key not in self.own_keys}

    def check_together(self, key: str, where: Where, problems: Problems) -> None:
        """What the named thing says of its settings as a whole, beyond each for itself."""
        model = settings_of(find(self.named["name"], self.name, None, self.fallback))
        try:
            model.model_validate(self.settings)
        except ValidationError as error:
            for detail in error.errors():
                _explain(detail, model, (key,), where, problems)

    def build(self, *arguments: Any) -> Any:
        """Call what `name` names with `arguments` and this section's settings."""
        return find(self.named["name"], self.name, None, self.fallback)(*arguments, **self.settings)


class ModelSection(Section):
    """The frozen base model."""

    named = {"task": "task"}
    name: str = Field("minilm", description='"minilm" (packaged, no download), a folder with a Hugging Face model, or a Hub id')
    task: str = Field("sequence-classification", description="what the model is fine-tuned for")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen base; adapters and head are always float32"
    )


class Columns(Section):
    """Which column of the data plays which part."""

    text: str = Field("text", description="the text to classify")
    text_pair: str | None = Field(None, description="the second text of a pair")
    label: str = Field("label", description="the class")
    client: str | None = Field("client", description="who owns the row, if there is such a column (partition natural)")
    domain: str | None = Field("domain", description="where the row comes from, if there is such a column (partition domain)")


class DataSection(OpenSection):
    """Where examples come from and how they are cut. `name`: a shipped source, a file or folder of CSV, JSON Lines or
    parquet, a Hub data set, or your own "file.py:function"."""

    named = {"name": "source"}
    fallback = "fedpeft.data.places:place"
    name: str = Field("docstrings", description='"docstrings", a file, a folder, a Hub data set id, or "file.py:function"')
    columns: Columns = Field(Columns(), description="which column plays which part")
    labels: list[str] | None = Field(None, min_length=2, description="the classes in order; null: those that occur, sorted")
    max_length: int = Field(32, ge=2, le=131072, description="tokens kept of an example; the rest is cut off at the end")
    max_examples: int | None = Field(None, ge=1, description="use a random subset of this many examples (before the split)")
    test_fraction: Share = Field(
        0.2, description="held out for the server's evaluation when there is no test split; 0: nothing, or with real clients everything"
    )
    evaluate_on: Literal["test", "validation"] = Field(
        "test", description='"validation": the server evaluates on a test_fraction of the training examples instead, to choose settings by'
    )
    validation_fraction: Share = Field(0.0, description="held out of every client's own examples for its own evaluation")

    @field_validator("labels")
    @classmethod
    def _once_each(cls, labels: list[str] | None) -> list[str] | None:
        if labels and len(set(labels)) < len(labels):
            raise PydanticCustomError("twice", "every class may stand once")
        return labels


class PartitionSection(OpenSection):
    """How the examples are split over the clients."""

    named = {"name": "partitioner"}
    name: str = Field("natural", description="how examples are dealt to clients")
    clients: int | None = Field(
        None, ge=1, description="number of clients; null: as many as the client column names (partition natural), else 10"
    )
    min_examples: int = Field(1, ge=1, description="every client gets at least this many examples, or the config is refused")


class AdapterSection(OpenSection):
    """What is trained and travels; further keys are PEFT's own."""

    named = {"name": "adapter"}
    name: str = Field("lora", description="the adapter family")


class StrategySection(OpenSection):
    """How the server turns many updates into one, and the shape of the run."""

    named = {"name": "strategy"}
    name: str = Field("fedavg", description="the aggregation strategy")
    num_rounds: int = Field(10, ge=1, description="rounds of the run")
    fraction_train: Fraction = Field(1.0, description="share of the available clients asked in a round (at least min_train_nodes)")
    min_train_nodes: int = Field(1, ge=1, description="fewest clients asked in a round, and fewest accepted updates for it to count")
    min_available_nodes: int = Field(1, ge=1, description="clients that must be there before a round starts")
    round_timeout: float = Field(3600.0, gt=0, description="seconds after which a round closes with the updates it has")
    max_update_norm: float = Field(1e4, gt=0, description="an update further than this (Euclidean) from what was sent is rejected")


class TrainingSection(Section):
    """What a client does with its turn."""

    named = {"engine": "engine", "optimizer": "optimizer", "lr_scheduler_type": "schedule", "head_init": "head_init"}
    learning_rate: float = Field(5e-3, ge=0, description="peak learning rate of the local optimiser")
    optimizer: str = Field("adamw", description="fresh in every round; moments do not travel")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient of a step to this norm; null: never")
    per_device_train_batch_size: int = Field(16, ge=1, description="examples a local step")
    per_device_eval_batch_size: int = Field(64, ge=1, description="examples a forward pass of the evaluation")
    gradient_accumulation_steps: int = Field(1, ge=1, description="batches summed into one optimiser step")
    max_steps: int | None = Field(5, ge=1, description="local steps a round; null: num_train_epochs decides")
    num_train_epochs: float | None = Field(None, gt=0, description="passes over the client's own examples a round, when max_steps is null")
    warmup_ratio: Share = Field(0.0, description="share of the whole run's steps with a rising learning rate")
    lr_scheduler_type: str = Field("linear", description="over the whole run, not within a round")
    head: Literal["trained", "frozen"] = Field(
        "trained", description="the classification head: trained and averaged, or left as initialised"
    )
    head_init: str = Field(
        "class_statistics", description="the head before round 1: random, or from class statistics summed over the clients"
    )
    engine: str = Field("one", description="one: a client at a time")
    device: str = Field("auto", description='"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"')

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainingSection:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise PydanticCustomError("steps", "give either max_steps or num_train_epochs and set the other to null")
        return self


class SimulationSection(Section):
    """How a federation is simulated on one machine."""

    named = {"engine": "simulation"}
    engine: str = Field("in-process", description="where simulated clients live")


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
    privacy: None = Field(None, description="differential privacy; null: none")
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
                    if issubclass(section, OpenSection):
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
                    _explain(detail, model, (), where, problems)
        problems.raise_if_any()
        for key, section in config:
            if isinstance(section, OpenSection):
                section.check_together(key, where, problems)
        problems.raise_if_any()
        config.strategy.build().check_config(config, config.adapter.build())
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
        below = into.setdefault(part, {})
        if not isinstance(below, dict):
            problems.add(f"{key} (command line)", f'"{part}" holds a value and no keys')
            return path
        into = below
    into[path[-1]] = value
    return path


def _explain(detail: ErrorDetails, model: type[BaseModel], above_model: yaml_file.Path, where: Where, problems: Problems) -> None:
    """One of pydantic's complaints about `model`, which stands at `above_model` in the config, as one line of ours."""
    path = (*above_model, *(str(part) for part in detail["loc"]))
    if detail["type"] == "extra_forbidden":
        above: Any = model
        for part in path[:-1]:
            above = above.model_fields[part].annotation
        known = list(above.model_fields)
        problems.add(where(path), "unknown key", ", ".join(known), nearest(path[-1], known))
    elif detail["type"] == "missing":
        problems.add(where(path), "is missing", do="give it a value")
    else:
        message = detail["msg"][0].lower() + detail["msg"][1:]
        got = detail["input"]
        problems.add(where(path), message if isinstance(got, dict | BaseModel) else f"got {got!r}; {message}")
