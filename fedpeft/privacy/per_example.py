"""Per-example gradients of linear layers in one backward pass, in closed form.

    y_t = W x_t + b,   g_t = dL_i/dy_t   =>   dL_i/dW = sum_t g_t x_t^T,   dL_i/db = sum_t g_t

LoRA's A and B and a classifier's layers are such layers: for B the input is h_t = A x_t and g_t carries s, for A it is
e_t = s B^T g_t. Each costs what the ordinary gradient costs; rows [batch, ...] are made layer by layer during the backward
pass and instead of it. Empty batches, checkpointing of either kind and records that are not finite are the caller's no more.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

Rows = dict[str, Any]
"""Name of a parameter -> its gradient for every record of the batch, [batch, *shape]."""


@contextmanager
def watching(model: Any, names: dict[str, Any], records: int) -> Iterator[Rows]:
    """Within the block, a backward pass of summed per-record losses fills the rows of the parameters of `names` (name ->
    parameter), all of them of linear layers (`uncovered` names those that are not), instead of their gradients.

    Of several `records` every such layer must see one row each, or equal parts of its rows in their order (training/apart.py
    looks); whatever it sees of a single one is that one's.
    """
    import torch

    rows: Rows = {}
    by_id = {id(parameter): name for name, parameter in names.items()}
    watched = []
    for module in model.modules():
        if type(module) is torch.nn.Linear and any(id(parameter) in by_id for parameter in module.parameters()):
            own = {slot: by_id[id(p)] for slot, p in module.named_parameters(recurse=False) if id(p) in by_id}
            module.forward = functools.partial(_linear(), module, own, rows, records)  # type: ignore[method-assign]
            watched.append(module)
    try:
        yield rows
    finally:
        for module in watched:
            del module.forward


def uncovered(model: Any, names: dict[str, Any]) -> Collection[str]:
    """The names of parameters that no linear layer owns, or that several do."""
    import torch

    owners: dict[int, int] = {}
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            for parameter in (module.weight, module.bias):  # and no other that something has put into the layer
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [name for name, parameter in names.items() if owners.get(id(parameter), 0) != 1]


@functools.cache
def _linear() -> Any:
    import torch
    from torch.nn import functional

    class Watched(torch.autograd.Function):
        """A linear layer whose backward pass puts rows aside and gives its parameters no gradient."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any, own: dict[str, str], rows: Rows, records: int) -> Any:
            ctx.save_for_backward(x, weight)
            ctx.own, ctx.rows, ctx.records = own, rows, records
            return functional.linear(x, weight, bias)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            (g,) = gradients
            x, weight = ctx.saved_tensors
            g3, x3 = (value.reshape(ctx.records, -1, value.shape[-1]).float() for value in (g, x))
            found = {"weight": lambda: torch.bmm(g3.transpose(1, 2), x3), "bias": lambda: g3.sum(dim=1)}
            for slot, name in ctx.own.items():
                made = found[slot]()  # type: ignore[no-untyped-call]
                ctx.rows[name] = ctx.rows[name] + made if name in ctx.rows else made
            return (g @ weight if ctx.needs_input_grad[0] else None), None, None, None, None, None

    def forward(module: Any, own: dict[str, str], rows: Rows, records: int, x: Any) -> Any:
        return Watched.apply(x, module.weight, module.bias, own, rows, records)  # type: ignore[no-untyped-call]

    return forward
