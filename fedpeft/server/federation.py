"""What the server's side of a run is made of, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedpeft.config import Config
from fedpeft.privacy.curator import Curator
from fedpeft.records import Arrays, Layout, Metrics, RoundRecord, TensorSpec
from fedpeft.strategies.strategy import Round, Strategy

FINISHED = "finished"


@dataclass(frozen=True)
class Survey:
    """Sums asked of every client before round 1, and what becomes of the global arrays with them."""

    action: str
    expects: Mapping[str, TensorSpec]  # what an answer looks like
    finish: Callable[[Arrays], Arrays]  # the sum of all answers -> new values for some of the global arrays


@dataclass(frozen=True)
class Federation:
    """All that a run needs to know on the server."""

    config: Config
    strategy: Strategy
    base: str  # fingerprint of the base model
    data: str  # digest of the data, where the server knows it: a resumed run must be on the same
    layout: Layout
    arrays: Arrays  # the adapter and head as drawn from the seed
    trained: tuple[str, ...]
    evaluate: Callable[[Arrays], Metrics]  # on the server's test split
    primary_metric: str
    higher_is_better: bool  # of the primary metric
    roster: Callable[[], dict[int, int]]  # client -> Flower node, of those that are there
    clients: int  # that belong to the federation
    resting: Callable[[Arrays], frozenset[str]] = lambda arrays: frozenset()  # tensors that neither train nor travel (Adapter.resting)
    settle: Callable[[Arrays], Arrays] = lambda arrays: arrays  # what the adapter makes of the average (Adapter.settle)
    ranks: Mapping[int, int] = field(default_factory=dict)  # client -> rank, where it is not that of the layout
    surveys: tuple[Survey, ...] = ()  # in the order in which they are taken
    reported: Callable[[Arrays], Arrays] = lambda arrays: arrays  # what is evaluated and exported, where no global model exists
    privacy: Callable[[], dict[str, Any] | None] = lambda: None  # what may be said of it; None where there is none
    curator: Curator | None = None  # where whole clients are private: what the server may show of their updates
    memories: Callable[[], Arrays] = dict  # what the clients of this process remember, for the checkpoint; real ones keep their own
    restore: Callable[[Arrays], None] = lambda memories: None

    @property
    def fewest(self) -> int:
        """Fewest accepted updates for a round to count; with a curator every round counts."""
        return 0 if self.curator else max(self.config.strategy.min_train_nodes, self.strategy.fewest)

    def trains(self, arrays: Arrays) -> tuple[str, ...]:
        """The tensors that training may move under the global `arrays`."""
        resting = self.resting(arrays)
        return tuple(name for name in self.trained if name not in resting)

    def at(self, round: int, client: int | None = None) -> Round:
        """What both sides know of a round; with `client`, as that client knows it."""
        r = None if client is None else self.ranks.get(client)
        layout = self.layout if r is None else self.layout.cut(r)
        return Round(round, self.config.strategy.num_rounds, layout, self.config.seed, self.clients)


@dataclass
class Outcome:
    """What a run came to. `stopped_because` is FINISHED or says what ended it early."""

    arrays: Arrays
    state: Arrays
    records: list[RoundRecord] = field(default_factory=list)
    stopped_because: str = FINISHED
    spent: set[int] = field(default_factory=set)  # clients whose privacy budget allows no further round
    seen: dict[int, int] = field(default_factory=dict)  # client -> round up to which it holds what was merged into the backbone
