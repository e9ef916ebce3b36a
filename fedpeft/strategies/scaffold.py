"""SCAFFOLD: control variates take the drift of each client out of its gradients.

    every step          theta <- theta - eta (g - c_k + c)
    after the turn      c_k+ = c_k - c + (theta_g - theta_k) / sum of eta      (option II);   uploads theta_k and c_k+ - c_k
    server              theta <- as the strategy underneath combines,   c <- c + (1/N) sum_{k in S} (c_k+ - c_k)

N clients in all, S those of the round. With plain SGD, c_k+ is exactly the mean of the client's own gradients (weighted by
step size), which is why another optimiser is refused: after AdamW the difference is not a gradient. Control variates are as
large as what trains: twice the bytes, both ways. They act on factors, not on products.

Paper: Karimireddy et al. 2020 (arXiv:1910.06378), algorithm 1. The clipped gradient takes the place of g.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

import numpy as np

from fedpeft.errors import Problem, UserError
from fedpeft.lookup import find
from fedpeft.records import BESIDE, Arrays, TensorSpec, Update
from fedpeft.strategies.over import Over
from fedpeft.strategies.strategy import Combined, Round, Strategy, Turn, streaming

CONTROL = BESIDE + "control."


class Scaffold(Over):
    """Corrects client drift with a remembered gradient a client and one for all."""

    paper: ClassVar[str] = "arXiv:1910.06378"
    stateful: ClassVar[bool] = True

    def refuses(self, inner: Strategy) -> str | None:
        """Strategies that refactor, keep part of the model at home, or have clients of their own rank."""
        if inner.refactors:
            return "it turns the basis of the factors, and control variates are gradients in the old one"
        if inner.personal or inner.mixed_ranks:
            return "control variates need the same tensors on all clients"
        return None

    def check_config(self, config: Any, adapter: Any) -> None:
        """Plain SGD only, at one rate for all tensors."""
        super().check_config(config, adapter)
        if not getattr(find("optimizer", config.training.optimizer), "plain", False):
            got = f'"{config.training.optimizer}", after which the way a client went is no sum of gradients'
            raise UserError(
                Problem("training.optimizer", got, "sgd, for strategy scaffold", "set training.optimizer=sgd and a larger learning_rate")
            )
        if not adapter.plain_steps:
            got = f"{config.adapter.name} moves some tensors at a rate or by a step of its own, which is no sum of gradients"
            raise UserError(Problem("adapter.name", got, do="take adapter lora, or another strategy"))

    def extras(self, arrays: Arrays) -> Arrays:
        """c = 0 for every tensor."""
        return {CONTROL + name: np.zeros_like(array) for name, array in arrays.items()}

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """What the strategy underneath sends, and c of what trains."""
        own = [name for name in names if not name.startswith(CONTROL)]
        controls = {CONTROL + name for name in self.inner.trains(own, at)}
        return tuple(sorted([*self.inner.sends(own, at), *controls.intersection(names)]))

    def uploads(self, names: Sequence[str], at: Round) -> dict[str, TensorSpec]:
        """Twice: values, and differences of control variates."""
        controls = {CONTROL + name: at.layout.tensors[name] for name in self.inner.trains(names, at)}
        return self.inner.uploads(names, at) | controls

    def drift(self, turn: Turn) -> Arrays:
        """c - c_k; c_k is zero the first time."""
        controls = [name for name in turn.received if name.startswith(CONTROL)]
        return {name.removeprefix(CONTROL): turn.received[name] - turn.memory.get(name, np.float32(0)) for name in controls}

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """Adds c_k+ - c_k to the upload, and remembers c_k+."""
        upload, memory = self.inner.end(turn, start, trained)
        renewed = {}
        for name, drift in self.drift(turn).items():
            way = start[name].astype(np.float64) - trained[name]
            renewed[CONTROL + name] = (way / turn.step_sizes - drift).astype(start[name].dtype)
        change = {name: array - turn.memory.get(name, np.float32(0)) for name, array in renewed.items()}
        return {**upload, **change}, {**turn.memory, **memory, **renewed}

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The strategy underneath combines; c moves by the mean change over all N clients."""
        changes: Arrays = {}

        def plain() -> Iterator[Update]:
            for update in updates:
                for name in (name for name in update.arrays if name.startswith(CONTROL)):
                    changes.setdefault(name, np.zeros(update.arrays[name].shape))[...] += update.arrays[name]
                yield dataclasses.replace(update, arrays={n: a for n, a in update.arrays.items() if not n.startswith(CONTROL)})
                del update

        inner = self.inner.combine(list(plain()) if isinstance(updates, Sequence) else cast(Sequence[Update], plain()), received, at)
        moved = {name: (received[name] + change / at.clients).astype(received[name].dtype) for name, change in changes.items()}
        return Combined({**inner.arrays, **moved}, inner.report)
