"""What `fedpeft list strategies` says of each: facts that the classes state, and traffic that is counted, not stated.

Traffic is that of K = 10 clients over four rounds after the first, for one square matrix of 768 under LoRA of rank 8, without
a head, relative to FedAvg-LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft import seeds
from fedpeft.lookup import find
from fedpeft.records import BESIDE, Arrays, Layout, Pair, TensorSpec, Update, merged_round, sparse_name
from fedpeft.strategies.over import Over
from fedpeft.strategies.strategy import Round, Strategy

K, D, R = 10, 768, 8
ROUNDS = range(2, 6)
A, B, CORE = "m.lora_A.weight", "m.lora_B.weight", "m.lora_A.core"
KINDS = {A: "A", B: "B", CORE: "core", "sketch.m": "sketch", "projected.m": "sketch", sparse_name("m"): "sparse values"}


@dataclass(frozen=True)
class Facts:
    """What somebody who chooses a strategy asks of it."""

    paper: str
    travels: tuple[str, ...]  # up, beside the head
    up: float  # bytes, relative to FedAvg-LoRA
    down: float
    exact: bool
    mixed_ranks: bool
    stateful: bool
    noise_proof: bool
    summable: bool
    of_mean: bool
    streams: bool

    def __str__(self) -> str:
        said = {
            "sends": " + ".join(self.travels),
            "bytes a round against fedavg": f"{self.up:.3g} up, {self.down:.3g} down",
            "exact": _yes(self.exact),
            "mixed ranks": _yes(self.mixed_ranks),
            "stateful clients": _yes(self.stateful),
            "noise in training protects uploads": _yes(self.noise_proof),
            "secure aggregation": _yes(self.summable),
            "privacy of whole clients": _yes(self.of_mean),
            "the server keeps": "sums" if self.streams else "every update of a round",
        }
        return "; ".join([self.paper, *(f"{key}: {value}" for key, value in said.items())])


def facts(name: str) -> Facts:
    """The facts of the strategy called `name` with its own defaults; of one over another, those of the two together."""
    target = find("strategy", name)
    strategy: Strategy = target(of="factors") if "of" in target.model_fields else target()
    parts = [strategy, strategy.inner] if isinstance(strategy, Over) else [strategy]
    travels, up, down = traffic(strategy)
    return Facts(
        paper=strategy.paper,
        travels=travels,
        up=up,
        down=down,
        exact=all(part.exact for part in parts),
        mixed_ranks=strategy.mixed_ranks,
        stateful=strategy.stateful,
        noise_proof=strategy.noise_proof,
        summable=all(part.summable for part in parts),
        of_mean=strategy.of_mean,
        streams=strategy.streams,
    )


def traffic(strategy: Strategy) -> tuple[tuple[str, ...], float, float]:
    """(kinds of tensors uploaded, bytes up, bytes down), a client and round, relative to both factors."""
    layout, arrays = _matrix(cored=strategy.of_cores)
    positions = strategy.sparse(layout, 0)
    arrays |= {sparse_name(module): np.zeros(len(where), np.float32) for module, where in positions.items()}
    layout = Layout(Layout.specs(arrays), layout.pairs)
    trained = [name for name in arrays if layout.pairs[0].core is None or name == CORE]
    arrays |= strategy.extras({name: arrays[name] for name in trained})
    kinds: dict[str, None] = {}
    up = down = 0
    for number in range(1, ROUNDS[-1] + 1):
        at = Round(number, ROUNDS[-1], layout, clients=K)
        sent = {*strategy.sends([name for name in arrays if merged_round(name) < 0], at)}
        sent |= {name for name in arrays if merged_round(name) == number - 1}
        updates = [_update(client, number, strategy.uploads(trained, at)) for client in range(K)]
        question = strategy.second(updates, at)
        answers = strategy.answers(at) if question else {}
        updates = [Update(number, u.client, {**u.arrays, **_update(u.client, number, answers).arrays}, 1) for u in updates]
        if number in ROUNDS:
            up += sum(array.nbytes for array in updates[0].arrays.values())
            down += sum(arrays[name].nbytes for name in sent) + sum(array.nbytes for array in question.values())
            kinds |= {KINDS.get(name, "control variates" if name.startswith(BESIDE) else name): None for name in sorted(updates[0].arrays)}
        combined = strategy.combine(updates, {**arrays, **question}, at)
        arrays = {**arrays, **combined.arrays}
    whole = len(ROUNDS) * 4 * 2 * D * R
    return tuple(kinds), up / whole, down / whole


def _matrix(cored: bool) -> tuple[Layout, Arrays]:
    core = CORE if cored else None
    arrays = {name: _drawn(shape, name) for name, shape in ((A, (R, D)), (B, (D, R)), (CORE, (R, R))) if cored or name != CORE}
    return Layout(Layout.specs(arrays), (Pair("m", A, B, 2.0, R, core=core),)), arrays


def _update(client: int, number: int, specs: Mapping[str, TensorSpec]) -> Update:
    return Update(number, client, {name: _drawn(spec.shape, f"{name}{client}{number}") for name, spec in specs.items()}, 1)


def _drawn(shape: tuple[int, ...], purpose: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return seeds.generator(0, purpose).standard_normal(shape, np.float32)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
