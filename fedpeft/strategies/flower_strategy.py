"""Any strategy of ours in anybody's Flower app: `flower("lora_fair", regularisation=0.1)` is a Flower `Strategy`.

The app's clients send PEFT adapters as they are (`ArrayRecord(get_peft_model_state_dict(model))`) beside "num-examples", as
for Flower's own FedAvg. Messages tell a client what to train: the config record's "trains" lists the names of the tensors
to send back. Sampling, rounds and evaluation are Flower's; a reply that does not fit is left out and logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result

from fedpeft.lookup import find
from fedpeft.records import Arrays, Layout, Pair, Update, all_finite
from fedpeft.strategies.strategy import Round, Strategy

A_FACTOR, B_FACTOR = ".lora_A.weight", ".lora_B.weight"
log = logging.getLogger(__name__)


def flower(
    name: str, fraction_train: float = 1.0, min_train_nodes: int = 2, min_available_nodes: int = 2, **settings: Any
) -> FlowerStrategy:
    """The strategy called `name`, with its own `settings`, behind Flower's interface.

    Raises UserError for an unknown name, pydantic's ValidationError for settings that are out of range.
    """
    return FlowerStrategy(find("strategy", name)(**settings), fraction_train, min_train_nodes, min_available_nodes)


def layout_of(arrays: Arrays) -> Layout:
    """The LoRA pairs in PEFT's adapter state. Scaling is taken as 1: it is the same for all clients and cancels."""
    modules = [name.removesuffix(A_FACTOR) for name in sorted(arrays) if name.endswith(A_FACTOR)]
    pairs = tuple(Pair(module, module + A_FACTOR, module + B_FACTOR, 1.0) for module in modules if module + B_FACTOR in arrays)
    return Layout(Layout.specs(arrays), pairs)


class FlowerStrategy(FlowerFedAvg):
    """One of our strategies, asked in the order that Flower asks: `configure_train` remembers the round for `aggregate_train`."""

    def __init__(self, strategy: Strategy, fraction_train: float, min_train_nodes: int, min_available_nodes: int) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=max(min_train_nodes, strategy.fewest),
            min_available_nodes=max(min_available_nodes, strategy.fewest),
        )
        self.strategy = strategy
        self.num_rounds = 0
        self.arrays: Arrays = {}
        self.state: Arrays | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's own loop; a strategy may want to know how long it is."""
        self.num_rounds = num_rounds
        self.arrays = {name: array.numpy() for name, array in initial_arrays.items()}
        self.strategy.check(layout_of(self.arrays))
        self.state = self.strategy.start(self.arrays)
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """What the strategy sends, and the names of what it wants back."""
        self.arrays = {name: array.numpy() for name, array in arrays.items()}
        at = self._at(server_round)
        config["trains"] = list(self.strategy.trains(tuple(self.arrays), at))
        sent = ArrayRecord({name: arrays[name] for name in self.strategy.sends(tuple(self.arrays), at)})
        return super().configure_train(server_round, sent, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine and apply; (None, None) keeps what was there, when too few replies fit."""
        at, replies = self._at(server_round), list(replies)
        wanted = {name: self.arrays[name] for name in self.strategy.trains(tuple(self.arrays), at)}
        updates = []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            update = None if reply.has_error() else self._read(reply, server_round, wanted)
            if update is None:
                log.warning("round %s: the reply of node %s does not fit and is left out", server_round, reply.metadata.src_node_id)
            else:
                updates.append(update)
        if len(updates) < self.strategy.fewest:
            return None, None
        combined = self.strategy.combine(updates, self.arrays, at)
        self.arrays, self.state = self.strategy.apply(self.arrays, combined.arrays, self.state or {})
        record = ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in self.arrays.items()})
        return record, MetricRecord(dict(combined.report))

    def _at(self, server_round: int) -> Round:
        return Round(server_round, self.num_rounds, layout_of(self.arrays))

    def _read(self, reply: Message, server_round: int, wanted: Arrays) -> Update | None:
        content = reply.content
        try:
            (record,) = content.array_records.values()
            (metrics,) = content.metric_records.values()
            arrays = {name: array.numpy() for name, array in record.items()}
            examples = int(metrics[self.weighted_by_key])  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError):
            return None
        if Layout.specs(arrays) != Layout.specs(wanted) or not all_finite(arrays) or examples < 1:
            return None
        return Update(server_round, reply.metadata.src_node_id, arrays, examples)
