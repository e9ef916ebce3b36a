"""Any strategy of ours in anybody's Flower app: `flower("lora_fair", regularisation=0.1)` is a Flower `Strategy`.

The app's clients send PEFT adapters as they are (`ArrayRecord(get_peft_model_state_dict(model))`) beside "num-examples", as
for Flower's own FedAvg. Messages tell a client what to train: the config record's "trains" lists the names of the tensors,
"uploads" those to send back. Sampling, rounds and evaluation are Flower's; a reply that does not fit is left out and logged.

Where the two lists differ the strategy has a half of its own at the client, which the app calls: `strategy.begin(turn)`,
`strategy.drift(turn)`, `strategy.end(turn, start, trained)`, on a `Turn` that holds what was received. A strategy that asks
twice in a round does so with "action": "second" in the config record; `strategy.answer(turn, asked)` is the reply.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result

from fedpeft.errors import Problem, UserError
from fedpeft.lookup import find
from fedpeft.records import BESIDE, MERGED, Arrays, Layout, Pair, TensorSpec, Update, all_finite, merged_round, sparse_name
from fedpeft.strategies.strategy import Round, Strategy

SEED = 0  # of what a strategy draws; both halves have it from the `Round`
SECOND = "second"
A_FACTOR, B_FACTOR = ".lora_A.weight", ".lora_B.weight"
log = logging.getLogger(__name__)


def flower(
    name: str,
    fraction_train: float = 1.0,
    min_train_nodes: int = 2,
    min_available_nodes: int = 2,
    scaling: float | None = None,
    **settings: Any,
) -> FlowerStrategy:
    """The strategy called `name`, with its own `settings`, behind Flower's interface.

    `scaling` is s of s B A, in PEFT lora_alpha / r (with use_rslora lora_alpha / sqrt(r)), the same for all clients. It is needed where
    part of the update leaves the factors for the backbone; elsewhere it cancels.
    Raises UserError for an unknown name or a scaling that is missing, pydantic's ValidationError for settings that are out of range.
    """
    strategy: Strategy = find("strategy", name)(**settings)
    if strategy.merges and scaling is None:
        got = f"none, and {name} moves part of the update from the factors into the weights"
        raise UserError(Problem("scaling", got, "a number", "give s of s B A: lora_alpha / r of the clients' LoraConfig"))
    return FlowerStrategy(strategy, fraction_train, min_train_nodes, min_available_nodes, 1.0 if scaling is None else scaling)


def layout_of(arrays: Arrays, scaling: float) -> Layout:
    """The LoRA pairs in PEFT's adapter state."""
    own = {name: array for name, array in arrays.items() if not name.startswith((MERGED, BESIDE))}
    modules = [name.removesuffix(A_FACTOR) for name in sorted(own) if name.endswith(A_FACTOR)]
    pairs = tuple(Pair(module, module + A_FACTOR, module + B_FACTOR, scaling) for module in modules if module + B_FACTOR in own)
    return Layout(Layout.specs(own), pairs)


class FlowerStrategy(FlowerFedAvg):
    """One of our strategies, asked in the order that Flower asks: `configure_train` remembers the round for `aggregate_train`."""

    def __init__(
        self, strategy: Strategy, fraction_train: float, min_train_nodes: int, min_available_nodes: int, scaling: float = 1.0
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=max(min_train_nodes, strategy.fewest),
            min_available_nodes=max(min_available_nodes, strategy.fewest),
        )
        self.strategy = strategy
        self.scaling = scaling
        self.num_rounds = 0
        self.arrays: Arrays = {}
        self.state: Arrays | None = None
        self.grid: Grid | None = None

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
        adapter = {name: array.numpy() for name, array in initial_arrays.items()}
        layout = layout_of(adapter, self.scaling)
        self.strategy.check(layout)
        positions = self.strategy.sparse(layout, SEED)
        adapter |= {sparse_name(module): np.zeros(len(where), np.float32) for module, where in positions.items()}
        self.arrays = {**adapter, **self.strategy.extras(adapter)}
        self.state = self.strategy.start(self.arrays)
        return super().start(grid, _record(self.arrays), num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """What the strategy sends, and the names of what it wants back."""
        self.arrays = {name: array.numpy() for name, array in arrays.items()}
        at = self._at(server_round)
        own = tuple(at.layout.tensors)
        config["trains"] = list(self.strategy.trains(own, at))
        config["uploads"] = list(self.strategy.uploads(own, at))
        plain = [name for name in self.arrays if merged_round(name) < 0]
        sent = {*self.strategy.sends(plain, at), *(set(self.arrays) - set(plain))}
        self.grid = grid
        return super().configure_train(server_round, ArrayRecord({name: arrays[name] for name in sorted(sent)}), config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine and apply; (None, None) keeps what was there, when too few replies fit."""
        at, replies = self._at(server_round), list(replies)
        updates = self._accepted(replies, at, self.strategy.uploads(tuple(at.layout.tensors), at))
        question = self.strategy.second(updates, at) if len(updates) >= self.strategy.fewest else {}
        if question:
            updates = self._ask_again(question, updates, at)
        if len(updates) < self.strategy.fewest:
            return None, None
        combined = self.strategy.combine(updates, {**self.arrays, **question}, at)
        self.arrays, self.state = self.strategy.apply(self.arrays, combined.arrays, self.state or {})
        return _record(self.arrays), MetricRecord(dict(combined.report))

    def _ask_again(self, question: Arrays, updates: list[Update], at: Round) -> list[Update]:
        """The second question to the nodes whose first reply fits; both replies make one update."""
        assert self.grid is not None
        config = ConfigRecord({"action": SECOND, "server-round": at.number})
        content = RecordDict({"arrays": _record(question), "config": config})
        first = {update.client: update for update in updates}
        replies = self.grid.send_and_receive([Message(content, dst_node_id=node, message_type=MessageType.TRAIN) for node in first])
        again = self._accepted(replies, at, self.strategy.answers(at))
        return [replace(first[update.client], arrays={**first[update.client].arrays, **update.arrays}) for update in again]

    def _accepted(self, replies: Iterable[Message], at: Round, wanted: Mapping[str, TensorSpec]) -> list[Update]:
        updates = []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            update = None if reply.has_error() else self._read(reply, at.number, wanted)
            if update is None:
                log.warning("round %s: the reply of node %s does not fit and is left out", at.number, reply.metadata.src_node_id)
            else:
                updates.append(update)
        return updates

    def _at(self, server_round: int) -> Round:
        return Round(server_round, self.num_rounds, layout_of(self.arrays, self.scaling), SEED, self.min_available_nodes)

    def _read(self, reply: Message, server_round: int, wanted: Mapping[str, TensorSpec]) -> Update | None:
        content = reply.content
        try:
            (record,) = content.array_records.values()
            (metrics,) = content.metric_records.values()
            arrays = {name: array.numpy() for name, array in record.items()}
            examples = int(metrics[self.weighted_by_key])  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError):
            return None
        if Layout.specs(arrays) != dict(wanted) or not all_finite(arrays) or examples < 1:
            return None
        return Update(server_round, reply.metadata.src_node_id, arrays, examples)


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})
