"""`Strategy`: what trains and travels, how many updates become one, how the global state moves. Frozen settings, pure functions.

The order of a round, with the file that calls each:

    server/asking.py     sends, fit                    which global tensors travel down; the rest every client holds already
    client/worker.py     begin(turn), drift(turn)      what training starts from, and what is added to every gradient
    client/worker.py     trains(names, at)             which tensors train
    client/worker.py     end(turn, ...)                what is uploaded (`uploads` says its form) and remembered
    server/rounds.py     second(updates, ...)          a second question in the same round, which few strategies have
    client/worker.py     answer(turn, asked)           its answer
    server/rounds.py     combine(updates, ...)         many updates to one
    server/rounds.py     apply(arrays, ...)            the server's step; server optimisers live here

Aggregation of LoRA is about products: with p_k = n_k / sum_j n_j over the accepted clients, the ideal update of a matrix is
sum_k p_k s_k B_k A_k, and each strategy says how near it comes (`products.py` computes it from factors).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings
from fedpeft.records import Arrays, Layout, Metrics, TensorSpec, Update
from fedpeft.strategies.fitting import fitted


@dataclass(frozen=True)
class Round:
    """What both sides know of a round."""

    number: int  # from 1
    total: int  # of the run
    layout: Layout  # of the global adapter; on a client, of its own rank
    seed: int = 0  # of the run
    clients: int = 1  # that belong to the federation, whether or not they take part


@dataclass(frozen=True)
class Combined:
    """What `combine` makes of a round: new values of some global tensors, and what the strategy has to say about them."""

    arrays: Arrays
    report: Metrics = field(default_factory=dict)


Gradients = Iterator[tuple[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class Turn:
    """What a client's half of a strategy may look at before and after training."""

    at: Round
    received: Arrays  # the global state, what was merged into the backbone included
    memory: Arrays  # what `end` left the last time this client took part; empty the first time
    gradients: Callable[[Arrays, int], Gradients]  # (arrays, batches) -> (module, dL/dW [d_out, d_in]) of each adapted layer
    step_sizes: float = 0.0  # sum of the learning rates of the turn's steps


Combine = TypeVar("Combine", bound=Callable[..., Combined])


def streaming(combine: Combine) -> Combine:
    """Marks a `combine` that reads its updates once, in their order, and keeps none: it may be given any iterable of them."""
    combine.streaming = True  # type: ignore[attr-defined]
    return combine


class Strategy(Settings):
    """The interface of every strategy.

    The class variables let strategies be combined with each other, with adapters and with privacy, and refused where a
    combination means nothing.
    """

    paper: ClassVar[str] = ""  # where it comes from
    of_factors: ClassVar[bool] = False  # it works on LoRA factors, and means nothing without them
    of_cores: ClassVar[bool] = False  # it works on the cores between frozen factors, and means nothing without them
    plain_mean: ClassVar[bool] = False  # `combine` is the weighted mean of the uploads
    exact: ClassVar[bool] = False  # the product it leaves is sum_k p_k s_k B_k A_k
    refactors: ClassVar[bool] = False  # it changes the basis of the factors, or moves part of the update elsewhere
    merges: ClassVar[bool] = False  # part of the update goes into the backbone, in units of its weights
    mixed_ranks: ClassVar[bool] = False  # clients may have different ranks
    stateful: ClassVar[bool] = False  # clients remember something between rounds
    personal: ClassVar[bool] = False  # part of each client's model stays with it: no global model exists
    summable: ClassVar[bool] = False  # the server needs only sums over clients: secure aggregation can hide the updates
    noise_proof: ClassVar[bool] = True  # what is uploaded is a function of what was trained: noise in training protects it
    from_mean: ClassVar[bool] = False  # `combine` of the updates' mean alone is its whole work: noise on the mean protects clients

    @property
    def streams(self) -> bool:
        """Whether `combine` may see the updates of a large round one by one; others need them all at hand. Marked by `streaming`,
        so that a subclass with a `combine` of its own has to say it anew."""
        return getattr(type(self).combine, "streaming", False)

    @property
    def fewest(self) -> int:
        """Fewest accepted updates that `combine` can work with."""
        return 1

    @property
    def of_mean(self) -> bool:
        """As `from_mean`; for one over another, whether both are."""
        return self.from_mean

    def proximal(self, at: Round) -> float:
        """mu of a proximal term in the clients' steps; 0: none."""
        return 0.0

    def tail(self, at: Round) -> tuple[float, float]:
        """(lambda, g) of a penalty lambda ||A[g r:]|| ||B[:, g r:]|| on the clients' factors; lambda = 0: none."""
        return 0.0, 1.0

    def check_config(self, config: Any, adapter: Any) -> None:
        """Raises UserError when the strategy means nothing beside the rest of a `Config`, whose `Adapter` is given; loads nothing."""
        if adapter.mixed_ranks and not self.mixed_ranks:
            got = f"clients of different ranks, which {type(self).__name__} cannot average"
            raise UserError(Problem("adapter.r", got, "one rank for all", "or take strategy flex_lora, flora, het_lora or fedex_lora"))
        if self.of_cores or adapter.has_cores:
            self._check_adapter(adapter.has_cores, adapter.has_cores)
        else:
            adapter.check_strategy(self)

    def check(self, layout: Layout) -> None:
        """Raises UserError when the strategy means nothing for adapters of this layout."""
        self._check_adapter(bool(layout.pairs), any(pair.core for pair in layout.pairs))

    def _check_adapter(self, factors: bool, cores: bool) -> None:
        name = type(self).__name__
        if self.of_factors and not factors:
            got = f"{name} works on LoRA factors, and the adapter has none"
            raise UserError(Problem("strategy.name", got, do="use adapter lora, or strategy fedavg"))
        if self.of_factors and cores:
            got = f"{name} works on factors A and B, and the adapter trains the core between them"
            raise UserError(Problem("strategy.name", got, do="use strategy fed_sb or fedavg"))
        if self.of_cores and not cores:
            got = f"{name} averages the cores of LoRA-SB, and the adapter has none"
            raise UserError(Problem("strategy.name", got, do="use adapter lora_sb, or strategy fedavg"))

    # --- what there is

    def sparse(self, layout: Layout, seed: int) -> Mapping[str, NDArray[np.int64]]:
        """Module -> flat positions in its weight that the strategy trains too, as the tensor `records.sparse_name(module)`."""
        return {}

    def extras(self, arrays: Arrays) -> Arrays:
        """Global tensors that the strategy adds to those of the adapter; names start with `records.BESIDE`."""
        return {}

    def start(self, arrays: Arrays) -> Arrays:
        """What the server remembers between rounds besides the global arrays; nothing by default."""
        return {}

    # --- what travels

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """Names, out of all global tensors, of those a client is sent; all by default. Others are checked by their digest."""
        return tuple(sorted(names))

    def fit(self, arrays: Arrays, layout: Layout, own: Layout) -> tuple[Arrays, float]:
        """The global tensors as a client of another rank can hold them, and how much of the product that leaves out."""
        return fitted(arrays, layout, own)

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """Names, out of the trainable tensors, of those a client trains in this round; all by default."""
        return tuple(sorted(names))

    def uploads(self, names: Sequence[str], at: Round) -> dict[str, TensorSpec]:
        """What a client sends back, out of the trainable tensors or made of them; what it trains by default."""
        return {name: at.layout.tensors[name] for name in self.trains(names, at)}

    # --- client

    def own(self, turn: Turn) -> Arrays:
        """The model of a client before it trains; what was received, by default."""
        return turn.received

    def begin(self, turn: Turn) -> Arrays:
        """What a client's training starts from. A merge of this round shifts the backbone for it alone."""
        return self.own(turn)

    def drift(self, turn: Turn) -> Arrays:
        """What is added to the gradients of the tensors named, in every step; nothing by default."""
        return {}

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """(what is uploaded, what the client remembers) after training from `start`; the trained tensors and nothing, by default."""
        return trained, {}

    def answer(self, turn: Turn, asked: Arrays) -> Arrays:
        """A client's answer to what `second` asks. Raises KeyError when its memory is missing."""
        return {}

    # --- server

    def second(self, updates: Sequence[Update], at: Round) -> Arrays:
        """What the server asks of every accepted client a second time in the same round; nothing by default."""
        return {}

    def answers(self, at: Round) -> dict[str, TensorSpec]:
        """What the answers to `second` look like; `combine` finds them in the updates."""
        return {}

    @abstractmethod
    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """Many updates, sorted by client, to one. `received` is the global state that the clients started from."""

    def apply(self, arrays: Arrays, combined: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        """The next global arrays and server state; by default what was combined replaces what was there."""
        return {**arrays, **combined}, state
