"""FedSA-LoRA: A is shared and averaged, B and the head stay with each client: personal models over a common basis.

    A <- sum_k p_k A_k;   client k's model: W + s B_k A

Half the bytes of FedAvg, and no head on the wire. There is no global model: a client's own is measured on its own
validation examples (data.validation_fraction), and what a run reports and exports is A with the mean of the B_k and heads,
where these are at hand, as they are in a simulation. A moves under a B that stays; a client that comes back after rounds
finds its B under a newer A.

Paper: Guo et al. 2024 (arXiv:2410.01463), section 3.2; the head stays at home as in the published configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from fedpeft.records import Arrays, TensorSpec, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy, Turn, streaming


class FedsaLora(Strategy):
    """Shares A and keeps B: what is common is learned together, what is a client's own stays there."""

    paper: ClassVar[str] = "arXiv:2410.01463"
    of_factors: ClassVar[bool] = True
    stateful: ClassVar[bool] = True
    personal: ClassVar[bool] = True
    summable: ClassVar[bool] = True

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """A alone."""
        return tuple(sorted(pair.A for pair in at.layout.pairs))

    def uploads(self, names: Sequence[str], at: Round) -> dict[str, TensorSpec]:
        """A alone."""
        return {pair.A: at.layout.tensors[pair.A] for pair in at.layout.pairs}

    def own(self, turn: Turn) -> Arrays:
        """A as received, with the client's own B and head."""
        return {**turn.received, **turn.memory}

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """A travels, the rest is remembered."""
        shared = {pair.A for pair in turn.at.layout.pairs}
        return {name: trained[name] for name in shared}, {name: array for name, array in trained.items() if name not in shared}

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The weighted mean of A."""
        return Combined(aggregation.mean(updates))
