"""`Task`: how examples become tensors, what the loss of a record is, and what is measured. A task is one file beside this one.

Who asks it what, in the order of a run:

    data/corpus.py                roles, unfit, classes      which columns an example needs, and what may stand in them
    base.py                       model_class, processor     what Transformers loads
    simulations/assemble.py       encode                     checked examples as tensors, unpadded
    client/node.py                arrange                    what a client trains on of them
    training/one.py, many.py      losses                     [batch]: records are not coupled, so their gradients may be clipped apart
    training/evaluate.py          outputs, measure           numbers of every record, and the metrics of all
    simulations/examples.py       tell                       what `fedpeft partition --examples` prints
    server/samples.py             show                       what the model says before and after the run
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Examples
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings
from fedpeft.records import Metrics
from fedpeft.sections import Columns, DataSection

if TYPE_CHECKING:
    import torch

    from fedpeft.adapters.adapted import Adapted
    from fedpeft.base import Base


class Task(Settings):
    """Settings of one task; its fields are keys of the config's `model` section."""

    peft_task: ClassVar[str | None] = None  # PEFT's name of the task
    kept_by_peft: ClassVar[frozenset[str]] = frozenset()  # modules of the head that PEFT keeps with an adapter for that task
    needs_labels: ClassVar[bool] = True  # every row has its class; else the label column only serves partitioners
    may_be_empty: ClassVar[frozenset[str]] = frozenset()  # roles whose cells may hold nothing

    @property
    @abstractmethod
    def primary_metric(self) -> str:
        """The metric that stands for the run."""

    @property
    def higher_is_better(self) -> bool:
        """Whether the primary metric grows as the model gets better."""
        return True

    @property
    def records_stay_apart(self) -> bool:
        """Whether a row of a batch is one example, whose gradient can be clipped alone."""
        return True

    @property
    def label_sets(self) -> bool:
        """An example has any number of classes, not exactly one."""
        return False

    @property
    def class_statistics(self) -> bool:
        """Whether a linear discriminant of the classes makes a head (training/surveys.py): one class an example, a linear head."""
        return self.needs_labels and not self.label_sets

    @abstractmethod
    def roles(self, columns: Columns) -> dict[str, str]:
        """Which column plays which part in an example."""

    def unfit(self, role: str, cell: Any) -> str | None:
        """What is wrong with a cell of that role, as the end of a sentence; None when it will do."""
        return None if isinstance(cell, str) else f"holds {_short(cell)} where a text should be"

    def classes(self, cell: Any) -> tuple[str, ...]:
        """The classes that a cell of the label column names."""
        return (str(cell),)

    @abstractmethod
    def model_class(self) -> Any:
        """The Transformers class that loads the base for this task."""

    def model_settings(self, label_count: int) -> dict[str, Any]:
        """What the model's config is told besides."""
        return {}

    def processor(self, read: Callable[[Any], Any]) -> Any:
        """What turns examples into input, by `read` of a Transformers loader: a tokenizer that can pad.

        Padding is on the right: a classifying decoder reads the last real token, and positions count from the first one.
        """
        from transformers import AutoTokenizer

        tokenizer = read(AutoTokenizer.from_pretrained)
        if tokenizer.pad_token is None:  # decoders are often published without one; padded positions are masked anyway
            if tokenizer.eos_token is None:
                got = "its tokenizer has no token to pad with, and no end token to take instead"
                raise UserError(Problem("model.name", got, do="set pad_token in the tokenizer_config.json of a local copy"))
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return tokenizer

    def own_head(self, model: Any) -> tuple[str, ...]:
        """Modules of the head that train whole and that PEFT has to be told of."""
        return ()

    @abstractmethod
    def encode(self, examples: Examples, base: Base, data: DataSection) -> Encoded:
        """All examples as tensors. Those that cannot be used stand in `left_out` of what comes back, with the reason."""

    def arrange(self, data: Encoded, base: Base, settings: DataSection) -> Encoded:
        """What one client trains on, of its own examples; by default just these."""
        return data

    @abstractmethod
    def losses(self, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """The loss of each record, [batch]. The one place where training calls the model."""

    @abstractmethod
    def outputs(self, model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """What `measure` needs of each record, [batch, numbers]."""

    @abstractmethod
    def measure(self, outputs: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Metrics:
        """The metrics, from what `outputs` gave for all records [records, numbers] and their labels."""

    def tell(self, inputs: dict[str, np.ndarray[Any, Any]], label: Any, names: tuple[str, ...], base: Base) -> tuple[str, str]:
        """Of one row of a batch, its facts in a line, and the row itself as a person can read it."""
        ids, pads = inputs["input_ids"], pads_of(inputs)
        kept = ids[pads[0] : len(ids) - pads[1]]
        said = ", ".join(names[code] for code in np.flatnonzero(label)) if np.ndim(label) else names[int(label)]
        return f"{len(kept)} tokens, {padding(pads)}; trains: {said or 'no class'}", repr(base.tokenizer.decode(kept))

    def show(self, adapted: Adapted, examples: Examples, data: DataSection) -> list[dict[str, Any]]:
        """What the model makes of some test examples, for people to read: lines of samples.jsonl, whose numbers are scores."""
        return []


def pads_of(inputs: dict[str, np.ndarray[Any, Any]]) -> tuple[int, int]:
    """Padding before and behind the tokens of a row."""
    there = np.flatnonzero(inputs["attention_mask"])
    return int(there[0]), len(inputs["attention_mask"]) - 1 - int(there[-1])


def padding(pads: tuple[int, int]) -> str:
    """How a row was filled up, in words."""
    said = [f"{count} of padding on the {side}" for count, side in zip(pads, ("left", "right"), strict=True) if count]
    return " and ".join(said) or "no padding"


def _short(cell: Any) -> str:
    said = repr(cell)
    return said if len(said) <= 60 else f"{said[:57]}..."
