"""What travels through a round: plain frozen records that know nothing of Flower or torch.

server                          client
Assignment  -- wire.py -->      worker.answer
Update, Failure  <-- wire.py -- (its reply)
RoundRecord  -> rounds.jsonl
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""Named tensors outside torch: float32 unless a `TensorSpec` says otherwise. The only form in which parameters cross a boundary."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Pair:
    """The two factors of one adapted matrix: its update is s * B @ A."""

    module: str
    A: str  # name of the [r, d_in] tensor
    B: str  # name of the [d_out, r] tensor
    s: float  # PEFT's own `scaling`: alpha / r, or alpha / sqrt(r) with rsLoRA
    r: int = 0  # the rank that `s` belongs to; 0 where all clients have the same
    power: float = 1.0  # s is alpha / r**power
    core: str | None = None  # name of an [r, r] tensor between the factors: the update is s * B @ core @ A

    def scaling(self, r: int) -> float:
        """s of a client whose rank is `r`."""
        return self.s * (self.r / r) ** self.power if self.r else self.s


MERGED = "merged."
"""Start of the names of what a strategy has merged into the backbone: merged.ROUND.MODULE.left [d_out, R] and .right [R, d_in]."""


def merge_names(round: int, module: str) -> tuple[str, str]:
    """Names of the two factors that `round` adds to the weight of `module`."""
    return f"{MERGED}{round:05d}.{module}.left", f"{MERGED}{round:05d}.{module}.right"


SPARSE = "sparse."
"""Start of the names of values that train inside a frozen weight: sparse.MODULE [positions]."""


def sparse_name(module: str) -> str:
    """Name of the values that are added to the weight of `module` at fixed positions."""
    return SPARSE + module


BESIDE = "beside."
"""Start of the names of what travels with the adapter in every message and is no part of it, such as SCAFFOLD's control variate."""


def merged_round(name: str) -> int:
    """The round that added a merged factor; -1 for a tensor that is none."""
    return int(name.removeprefix(MERGED).partition(".")[0]) if name.startswith(MERGED) else -1


def merged_module(name: str) -> str:
    """The module that a merged factor belongs to."""
    return name.removeprefix(MERGED).partition(".")[2].rpartition(".")[0]


@dataclass(frozen=True)
class Layout:
    """What the global adapter looks like; names are those of PEFT's adapter_model.safetensors."""

    tensors: Mapping[str, TensorSpec]
    pairs: tuple[Pair, ...] = ()
    head: tuple[str, ...] = ()  # whole layers that travel beside the adapter (the classifier)
    output_weight: str | None = None  # the head's last [labels, features] matrix
    output_bias: str | None = None

    def cut(self, r: int) -> Layout:
        """The layout of a client whose rank is `r`: smaller factors, and the scaling of that rank."""
        tensors = dict(self.tensors)
        for pair in self.pairs:
            A, B = tensors[pair.A], tensors[pair.B]
            tensors |= {pair.A: TensorSpec((r, A.shape[1]), A.dtype), pair.B: TensorSpec((B.shape[0], r), B.dtype)}
        return replace(self, tensors=tensors, pairs=tuple(replace(pair, s=pair.scaling(r), r=r) for pair in self.pairs))

    @staticmethod
    def specs(arrays: Arrays) -> dict[str, TensorSpec]:
        """What `arrays` look like, by name."""
        return {name: TensorSpec(arrays[name].shape, str(arrays[name].dtype)) for name in sorted(arrays)}


@dataclass(frozen=True)
class Assignment:
    """What the server asks of one client."""

    action: str  # wire.TRAIN, or the survey before round 1 that the config agrees to
    round: int  # counted from 1; 0 is the time before training
    client: int
    arrays: Arrays
    held: str = ""  # digest of the tensors that do not travel since the client has them from the seed


@dataclass(frozen=True)
class Update:
    """What a client answers: values (not differences) of the tensors it was asked for."""

    round: int
    client: int
    arrays: Arrays
    examples: int  # n_k, the weight of the client in an average
    metrics: Metrics = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A client that did not deliver. A record, not an exception: the round goes on with the rest."""

    round: int
    client: int
    reason: str
    epsilon: float | None = None  # what the client has spent so far, where it said so


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl. Round 0 holds what was measured and exchanged before training."""

    round: int
    asked: int
    accepted: int
    rejected: dict[str, int]  # reason -> how many clients
    rejected_clients: dict[str, str]  # client -> reason, in full, of at most a hundred
    loss: float | None  # n_k-weighted mean of the clients' own training losses
    metrics: Metrics  # on the server's held-out test split
    examples: int
    bytes_up: int  # serialised messages, clients to server
    bytes_down: int
    update_norm: float  # of the global state's move, over all tensors
    client_update_norms: dict[str, float]  # of at most a hundred clients, those that went farthest
    seconds: dict[str, float]  # by phase: exchange (the clients' training is in it), combine, evaluate
    epsilon: float | None = None
    report: dict[str, float] = field(default_factory=dict)  # what the strategy has to say


def all_finite(arrays: Arrays) -> bool:
    """No NaN and no infinity in any array."""
    return all(bool(np.isfinite(array).all()) for array in arrays.values())
