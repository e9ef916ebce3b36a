"""The model with every client's own adapter and head in it: what replaces the forward of adapted layers while `many` runs.

    y_i = W0 x_i + s_c B_c A_c x_i + L_c R_c x_i        i a row of the pass, c its client, L_c R_c what only c has merged

A_c and B_c are gathered a row, since x is far larger than they are: clients may have any rows in a pass. A whole layer of
the head has large weights and small inputs, so there the rows are gathered by client instead. Everything between the
adapted layers is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.records import SPARSE, Pair
from fedpeft.training.masks import UnsuitedError
from fedpeft.training.stacked import Own

if TYPE_CHECKING:
    import torch

Forward = Callable[..., Any]


@dataclass
class Cohort:
    """What the layers look up: the cohort's tensors, and who sits where in the pass that is under way."""

    tensors: Mapping[str, Own]
    scalings: Mapping[str, torch.Tensor]  # LoRA module -> s [clients, 1, 1]
    shifts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # LoRA module -> L [clients, d_out, q], R [clients, q, d_in]
    seats: Any = None  # [rows], ascending: the client of every row
    present: Any = None  # the clients of the pass
    places: Any = None  # for every row, its client's place in `present` and the how-manieth of its client it is
    most: int = 0  # rows of the client that has the most
    time: int = 0  # tokens of a row, padding included

    def sit(self, seats: Sequence[int], time: int, device: str) -> None:
        """Make ready for a pass whose rows are those of `seats`."""
        import torch

        present, place, sizes = np.unique(seats, return_inverse=True, return_counts=True)
        numbers = np.concatenate([np.arange(size) for size in sizes])
        self.seats, self.present = (torch.tensor(found, device=device) for found in (seats, present))
        self.places = tuple(torch.tensor(found, device=device) for found in (place, numbers))
        self.most, self.time = int(sizes.max()), time

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """x as [rows, n, features]."""
        rows = len(self.seats)
        if len(x) != rows and not (x.ndim == 2 and len(x) == rows * self.time):
            raise UnsuitedError(f"a layer sees {tuple(x.shape)}, which is not one entry a row")
        return x.reshape(rows, -1, x.shape[-1])


def obstacle(adapted: Adapted) -> str | None:
    """Why the model of `adapted` cannot train many clients in one pass; None where it can."""
    import torch
    from peft.tuners.lora.layer import Linear as LoraLinear

    modules = dict(adapted.model.named_modules())
    for name, module in modules.items():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            return f"{name} normalises over the rows of a batch"
        if hasattr(module, "expert_capacity"):
            return f"{name} routes the rows of a batch to experts of bounded capacity"
    if any(name.startswith(SPARSE) for name in adapted.parameters):
        return "values train inside frozen weights"
    known = {id(parameter) for _, parameter in _whole(adapted)}
    for pair in adapted.layout().pairs:
        layer = modules[pair.module]
        name = adapted.model.active_adapter
        plain = type(layer) is LoraLinear and name not in layer.lora_variant and layer.lora_B[name].bias is None
        if not plain:
            return f"{pair.module} is no plain LoRA on a linear layer"
        known |= {id(layer.lora_A[name].weight), id(layer.lora_B[name].weight)}
    strangers = [name for name, parameter in adapted.parameters.items() if id(parameter) not in known]
    return f"{strangers[0]} belongs to a layer that has no stacked form" if strangers else None


def _whole(adapted: Adapted) -> list[tuple[torch.nn.Module, torch.nn.Parameter]]:
    """The parameters of layers that train whole, each with its layer."""
    import torch

    own = {id(adapted.parameters[name]) for name in adapted.head}
    kinds = (torch.nn.Linear, torch.nn.LayerNorm)
    modules = [module for module in adapted.model.modules() if type(module) in kinds]
    return [(module, parameter) for module in modules for parameter in module.parameters(recurse=False) if id(parameter) in own]


@contextmanager
def stacked(adapted: Adapted, cohort: Cohort) -> Iterator[None]:
    """Let the adapted layers and the head serve `cohort` inside the block."""
    import torch

    modules = dict(adapted.model.named_modules())
    names = {id(parameter): name for name, parameter in adapted.parameters.items()}
    changed: dict[torch.nn.Module, Forward] = {}
    for pair in adapted.layout().pairs:
        changed[modules[pair.module]] = _lora(modules[pair.module], pair, cohort, adapted.model.active_adapter)
    for layer, _ in _whole(adapted):
        found = {kind: cohort.tensors[names[id(parameter)]] for kind, parameter in layer.named_parameters(recurse=False)}
        make = _linear if isinstance(layer, torch.nn.Linear) else _layer_norm
        changed[layer] = make(layer, found["weight"], found.get("bias"), cohort)
    try:
        for layer, forward in changed.items():
            layer.forward = forward
        yield
    finally:
        for layer in changed:
            layer.__dict__.pop("forward", None)


def _lora(layer: Any, pair: Pair, cohort: Cohort, adapter: str) -> Forward:
    A, B, s = cohort.tensors[pair.A], cohort.tensors[pair.B], cohort.scalings[pair.module]
    L, R = cohort.shifts.get(pair.module, (None, None))

    def forward(input: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        import torch

        output: torch.Tensor = layer.base_layer(input, *args, **named)
        x = cohort.by_row(layer.lora_dropout[adapter](input.float()))
        y = cohort.by_row(output)
        h = torch.bmm(x, A.of(cohort.seats).mT) * s[cohort.seats]  # [rows, n, r]
        y = torch.baddbmm(y.float(), h, B.of(cohort.seats).mT)
        if L is not None and R is not None:
            z = torch.bmm(cohort.by_row(input.float()), R[cohort.seats].mT)
            y = torch.baddbmm(y, z, L[cohort.seats].mT)
        return y.to(output.dtype).view(output.shape)

    return forward


def _linear(layer: Any, weight: Own, bias: Own | None, cohort: Cohort) -> Forward:
    def forward(input: torch.Tensor) -> torch.Tensor:
        import torch

        x = cohort.by_row(input)
        grouped = x.new_zeros(len(cohort.present), cohort.most, *x.shape[1:]).index_put(cohort.places, x)  # [present, most, n, d_in]
        y = torch.bmm(grouped.flatten(1, 2), weight.of(cohort.present).mT).view(*grouped.shape[:3], -1)[cohort.places]  # [rows, n, d_out]
        y = y if bias is None else y + bias.of(cohort.seats)[:, None]
        return y.view(*input.shape[:-1], y.shape[-1])

    return forward


def _layer_norm(layer: Any, weight: Own, bias: Own | None, cohort: Cohort) -> Forward:
    def forward(input: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        y = cohort.by_row(functional.layer_norm(input, layer.normalized_shape, eps=layer.eps)) * weight.of(cohort.seats)[:, None]
        return (y if bias is None else y + bias.of(cohort.seats)[:, None]).view(input.shape)

    return forward
