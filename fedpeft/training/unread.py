"""The last layer without the tokens that nobody reads.

A head on the first token reads nothing else of the last layer, and behind its attention tokens do not meet again:

    a[:, 0] = norm(W_o attention(h)[:, 0] + h[:, 0]),   h'[:, 0] = norm(FFN(a[:, 0]) + a[:, 0])

so that these are computed for the first token alone: a seventh of the products of a six-layer encoder less, forward and backward.

Where that may be done is found by trial, without knowing the architecture: at the first module of the last layer that is given
two tensors [rows, time, features], where BERT and its kin add what went around the attention. All but the first token is made NaN
there, which spreads to whoever reads it: when the task's outputs stay as they were, the tokens are left out from there on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.adapters.layers import layer_of
from fedpeft.data.encoded import Encoded
from fedpeft.training.prefix import APART

if TYPE_CHECKING:
    import torch

    from fedpeft.adapters.adapted import Adapted


class Unread:
    """What is left out of one model. `ready` looks once, and the model stays so.

    Whoever runs the model asks first: a client in a process of its own then ends at the bits that it has in a simulation.
    """

    def __init__(self, adapted: Adapted, ask: Callable[..., Any] | None = None) -> None:
        self.adapted = adapted
        self.left_out_at: str | None = None  # the module from which on there is one token a row
        self._ask = ask  # (model, inputs, labels) -> [batch, numbers]: a task's call of the model, such as its `outputs`

    def ready(self, data: Encoded) -> None:
        """Try it on the two longest examples, when first called with more than a token to see."""
        import torch

        if (ask := self._ask) is None:
            return
        longest = sorted(range(len(data)), key=data.length, reverse=True)[:2]
        if data.length(longest[0]) == 1:
            return
        self._ask = None
        model, was = self.adapted.model, self.adapted.model.training
        batch = data.batch(np.array(longest), self.adapted.base.tokenizer, self.adapted.base.device)
        model.eval()
        try:
            with torch.no_grad():
                self._look(lambda: ask(model, *batch))
        finally:
            model.train(was)

    def _look(self, outputs: Callable[[], torch.Tensor]) -> None:
        modules = dict(self.adapted.model.named_modules())
        met: list[str] = []
        hooks = [
            modules[name].register_forward_pre_hook(lambda module, args, name=name: met.append(name) if _meet(args) else None)
            for name in _last_layer(list(modules))
        ]
        try:
            whole = outputs()
        finally:
            for hook in hooks:
                hook.remove()
        for name in met[:1]:
            hook = modules[name].register_forward_pre_hook(_poisoned)
            untouched = _equal(outputs(), whole)
            hook.remove()
            if untouched:
                hook = modules[name].register_forward_pre_hook(_first_token)
                try:
                    short = outputs()
                except (RuntimeError, ValueError, IndexError):  # what follows counts on all tokens
                    hook.remove()
                    return
                if _equal(short, whole):
                    self.left_out_at = name
                else:
                    hook.remove()


def _last_layer(names: list[str]) -> list[str]:
    """The modules inside the last layer, where there is one list of layers."""
    at = {name: layer for name in names if (layer := layer_of(name)) is not None}
    if len({stack for stack, _ in at.values()}) != 1:
        return []
    last = max(number for _, number in at.values())
    return [name for name, (_, number) in at.items() if number == last]


def _timed(value: Any) -> bool:
    return getattr(value, "ndim", 0) == 3 and value.shape[1] > 1


def _meet(args: tuple[Any, ...]) -> bool:
    return sum(map(_timed, args)) == 2


def _poisoned(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    def poison(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 1:] = float("nan")
        return value

    return tuple(poison(value) if _timed(value) else value for value in args)


def _first_token(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value[:, :1] if _timed(value) else value for value in args)


def _equal(found: torch.Tensor, whole: torch.Tensor) -> bool:
    return found.shape == whole.shape and bool((found - whole).abs().max() <= APART * whole.abs().max())
