"""The sections of a config, whose defaults are the quickstart (`configs/quickstart.yaml` says them aloud).

A section with a `name` takes the settings of what it names (`lookup.py`) as further keys: `partition: {name: dirichlet,
alpha: 0.3}` gives alpha to `data/partitions/dirichlet.py`. The model's further keys are those of its `task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedpeft.complaints import Where, explain
from fedpeft.errors import Problems
from fedpeft.lookup import Settings, find, settings_of

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(Settings):
    """A section of the config. `named` maps a key that holds a name to the table it is looked up in."""

    named: ClassVar[Mapping[str, str]] = {}


class OpenSection(Section):
    """A section whose further keys are the settings of what its `name` names."""

    opens: ClassVar[str] = "name"  # the key whose named thing gives the further keys
    fallback: ClassVar[str | None] = None  # what answers to a name that no table holds
    own_keys: ClassVar[frozenset[str]]  # set on a completed class: the keys that are the section's and not the named thing's
    name: str

    @classmethod
    def completed(cls, name: str, where: str) -> type[OpenSection]:
        """This section with the settings of what the opening key names as further fields."""
        model = settings_of(find(cls.named[cls.opens], name, where, cls.fallback))
        fields: dict[str, Any] = {key: (field.annotation, field) for key, field in model.model_fields.items()}
        section = create_model(cls.__name__, __base__=cls, **fields)
        section.own_keys = frozenset(cls.model_fields)
        return section

    @property
    def settings(self) -> dict[str, Any]:
        """The validated settings of what is named, defaults filled in."""
        return {key: getattr(self, key) for key in type(self).model_fields if key not in self.own_keys}

    def check_together(self, key: str, where: Where, problems: Problems) -> None:
        """What the named thing says of its settings as a whole, beyond each for itself."""
        model = settings_of(self._named)
        try:
            model.model_validate(self.settings)
        except ValidationError as error:
            for detail in error.errors():
                explain(detail, model, (key,), where, problems)

    def build(self, *arguments: Any) -> Any:
        """Call what is named with `arguments` and this section's settings."""
        return self._named(*arguments, **self.settings)

    @property
    def _named(self) -> Any:
        return find(self.named[self.opens], getattr(self, self.opens), None, self.fallback)


class ModelSection(OpenSection):
    """The frozen base model, and what it is fine-tuned for; further keys are the task's own."""

    named = {"task": "task"}
    opens = "task"
    name: str = Field("minilm", description='"minilm" (packaged, no download), a folder with a Hugging Face model, or a Hub id')
    task: str = Field("sequence-classification", description="what the model is fine-tuned for")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen base; adapters and head are always float32"
    )
    dropout: bool = Field(True, description="false: the base's own dropouts are off, whatever its config says")
    quantization: Literal["8bit", "4bit"] | None = Field(None, description="of the frozen base, by bitsandbytes; needs a CUDA GPU")


class Columns(Section):
    """Which column of the data plays which part."""

    text: str = Field("text", description="the text to classify")
    text_pair: str | None = Field(None, description="the second text of a pair")
    image: str = Field("image", description="the picture: bytes, or the path of a file")
    prompt: str | None = Field("prompt", description="what is asked of a language model; null: it learns plain text")
    context: str | None = Field(None, description="what the prompt is about, set below it; may be empty")
    completion: str = Field("completion", description="what a language model should say")
    messages: str | None = Field(None, description='instead of these: conversations, lists of {"role", "content"}')
    label: str = Field("label", description="the class, or the classes")
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
    fallback = "fedpeft.adapters.others:other"
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
        "class_statistics",
        description="the head before round 1: random, or from class statistics summed over the clients (where an example has one class)",
    )
    engine: str = Field(
        "many", description="many: many clients in one pass, each with the numbers it has alone but for rounding; one: a client at a time"
    )
    clients_at_once: int | None = Field(None, ge=1, description="clients that engine many trains together; null: what memory_gb allows")
    memory_gb: float | None = Field(
        None, gt=0, description="memory that engine many plans for; null: a quarter of the machine's, or most of what is free on a GPU"
    )
    length_buckets: int = Field(
        1,
        ge=1,
        description="cut each batch into so many of like length, for less padding; a step holds the same examples (not under privacy)",
    )
    prefix_cache: Literal["none", "memory", "disk"] = Field(
        "none", description="keep the hidden states that enter the lowest adapted layer, by example, instead of computing them again"
    )
    prefix_cache_gb: float = Field(1.0, gt=0, description="most that these states may take; what does not fit is computed each time")
    device: str = Field("auto", description='"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1"')

    @property
    def asks_before(self) -> bool:
        """The head's start needs sums over the clients' data."""
        return bool(find("head_init", self.head_init).asks)

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainingSection:
        if (self.max_steps is None) == (self.num_train_epochs is None):
            raise PydanticCustomError("steps", "give either max_steps or num_train_epochs and set the other to null")
        return self


class PrivacySection(Section):
    """Differential privacy over the whole run: of single examples, by the clients' steps, or of whole clients, at the server."""

    unit: Literal["example", "client"] = Field(
        "example", description="what neighbouring data sets differ by: one example of one client, or a whole client"
    )
    target_epsilon: float | None = Field(None, gt=0, description="budget over the whole run; sigma is solved for it")
    noise_multiplier: float | None = Field(None, ge=0, description="sigma, noise over clipping norm, instead of or beside a budget")
    target_delta: float | None = Field(None, gt=0, lt=1, description="delta; null: 1e-5, or n ** -1.1 where n (examples, clients) is small")
    max_grad_norm: float = Field(1.0, gt=0, description="unit example: C, what the gradient of one example is clipped to")
    clipping_norm: float = Field(
        1.0, gt=0, description="unit client: C, what a client's whole update is clipped to; at first, where it adapts"
    )
    target_quantile: float | None = Field(
        None, gt=0, lt=1, description="unit client: share of updates to leave unclipped; C moves there, at a cost. null: C stays"
    )
    quantile_learning_rate: float = Field(0.2, gt=0, description="unit client: how fast C moves, in its logarithm")
    quantile_noise: float | None = Field(
        None, gt=0, description="unit client: noise on the count of unclipped updates; null: a twentieth of the clients asked, or sigma"
    )
    amplification: bool = Field(
        False, description="unit client: count on nobody knowing who took part; the server then throws a secret coin for each client"
    )
    insecure_seed: int | None = Field(None, description="seed of the noise, for tests: whoever knows it can take the noise off again")

    @property
    def of_clients(self) -> bool:
        """The unit is a client."""
        return self.unit == "client"

    @model_validator(mode="after")
    def _noise(self) -> PrivacySection:
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise PydanticCustomError("noise", "give target_epsilon, or noise_multiplier, or both")
        return self

    @model_validator(mode="after")
    def _of_this_unit(self) -> PrivacySection:
        """Keys of the other unit would be read by nobody."""
        clients = ("clipping_norm", "target_quantile", "quantile_learning_rate", "quantile_noise", "amplification")
        for key in ("max_grad_norm",) if self.of_clients else clients:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise PydanticCustomError("unit", "{key} means nothing with unit {unit}", {"key": key, "unit": self.unit})
        return self


class SimulationSection(Section):
    """How a federation is simulated on one machine."""

    named = {"engine": "simulation"}
    engine: str = Field("in-process", description="where simulated clients live: in this process, or in actors of Ray")
    actors: int | None = Field(None, ge=1, description="of engine ray: how many; null: one a GPU, or one a CPU where there is none")
    cpus_per_actor: float = Field(1.0, gt=0, description="of engine ray: CPUs that an actor takes, which is also its number of threads")
    gpus_per_actor: float | None = Field(None, ge=0, description="of engine ray: share of a GPU, or GPUs; null: an equal share of all")
    address: str | None = Field(
        None, description='of engine ray: "auto" or HOST:PORT of a Ray cluster that runs; null: one is started here, and stopped'
    )
