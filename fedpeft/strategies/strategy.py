"""`Strategy`: what trains and travels, how many updates become one, how the global state moves. Frozen settings, pure functions.

The order of a round, with the file that calls each:

    server/rounds.py     sends(names, at)                which global tensors travel down; the rest every client has from the seed
    client/worker.py     trains(names, at)               which tensors train, and travel up
    client/worker.py     begin(turn), end(turn, ...)     what training starts from; what is uploaded and remembered
    server/rounds.py     combine(updates, received, at)  many updates to one
    server/rounds.py     apply(arrays, combined, state)  the server's step; server optimisers live here

Aggregation of LoRA is about products: with p_k = n_k / sum_j n_j over the accepted clients, the ideal update of a matrix is
sum_k p_k s B_k A_k, and each strategy says how near it comes (`products.py` computes it from factors).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings
from fedpeft.records import Arrays, Layout, Metrics, Update


@dataclass(frozen=True)
class Round:
    """What both sides know of a round."""

    number: int  # from 1
    total: int  # of the run
    layout: Layout
    seed: int = 0  # of the run


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


class Strategy(Settings):
    """The interface of every strategy.

    Four facts let strategies be combined, and refused where a combination means nothing.
    """

    of_factors: ClassVar[bool] = False  # it works on LoRA factors, and means nothing without them
    plain_mean: ClassVar[bool] = False  # `combine` is the weighted mean of the uploads
    exact: ClassVar[bool] = False  # the product it leaves is sum_k p_k s B_k A_k
    refactors: ClassVar[bool] = False  # it changes the basis of the factors, or moves part of the update elsewhere

    @property
    def fewest(self) -> int:
        """Fewest accepted updates that `combine` can work with."""
        return 1

    def proximal(self, at: Round) -> float:
        """mu of a proximal term in the clients' steps; 0: none."""
        return 0.0

    def check(self, layout: Layout) -> None:
        """Raises UserError when the strategy means nothing for adapters of this layout."""
        if self.of_factors and not layout.pairs:
            got = f"{type(self).__name__} works on LoRA factors, and the adapter has none"
            raise UserError(Problem("strategy.name", got, do="use adapter lora, or strategy fedavg"))

    def start(self, arrays: Arrays) -> Arrays:
        """What the server remembers between rounds besides the global arrays; nothing by default."""
        return {}

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """Names, out of all global tensors, of those a client is sent; all by default. Others are checked by their digest."""
        return tuple(sorted(names))

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """Names, out of the trainable tensors, of those a client trains in this round and sends back; all by default."""
        return tuple(sorted(names))

    def begin(self, turn: Turn) -> Arrays:
        """What a client's training starts from; what was received, by default. A merge of this round shifts the backbone for it alone."""
        return turn.received

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """(what is uploaded, what the client remembers) after training from `start`; the trained tensors and nothing, by default."""
        return trained, {}

    @abstractmethod
    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """Many updates, sorted by client, to one. `received` is the global state that the clients started from."""

    def apply(self, arrays: Arrays, combined: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        """The next global arrays and server state; by default what was combined replaces what was there."""
        return {**arrays, **combined}, state
