"""Transformer layers by the names of their modules: encoder.layer.3.attention.self.query is in layer 3 of "encoder.layer".

The first number in a name counts layers, in every architecture of Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def layer_of(module: str) -> tuple[str, int] | None:
    """(path of the stack, number in it) of the layer that a module belongs to; None outside every layer."""
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


@contextmanager
def forward_as(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` compute `forward` inside the block, and what it computed before after it, unless somebody else has changed it since."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if vars(module).get("forward") is forward:
            del module.forward
            if before is not None:
                module.forward = before


def lowest(modules: Sequence[tuple[str, Any]], trained: Collection[int]) -> int | None:
    """The number of the first layer, in the order of `modules`, that holds a parameter whose id is among `trained`.

    0 when such a parameter lies before all layers, the number of layers when it lies behind them, None when there is none.
    """
    behind = 0
    for name, module in modules:
        layer = layer_of(name)
        if any(id(parameter) in trained for parameter in module.parameters(recurse=False)):
            return layer[1] if layer else behind
        behind = max(behind, layer[1] + 1) if layer else behind
    return None
