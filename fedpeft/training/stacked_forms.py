"""The layers that have a form for many clients: what each computes when every row of a pass has its own client's tensors.

    LoRA         y_i = W0 x_i + s_c B_c g_c R_c A_c x_i + L_c R'_c x_i      g FoRA's gate, R LoRA-SB's core, each where it is
    MiSS         y_i = W0 x_i + M_c^T (sum of the blocks of x_i)
    a whole layer of the head: linear, layer norm

i is a row of the pass, c its client, L_c R'_c what only c has merged. Tensors are gathered a row, since x is far larger than
they are: clients may have any rows in a pass. A whole linear layer has large weights and small inputs, so there the rows
are gathered by client instead, unless gradients are wanted by row. Everything between these layers is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fedpeft.adapters.fora import GATE
from fedpeft.training.stacked import Own

if TYPE_CHECKING:
    import torch

    from fedpeft.training.stacked_layers import Cohort

Forward = Callable[..., Any]
Slots = dict[str, Any]  # what the form calls a tensor -> the parameter


class Form(NamedTuple):
    """One kind of layer."""

    slots: Callable[[Any, str], Slots | None]  # (layer, name of the adapter) -> its tensors; None: no layer of this kind
    forward: Callable[[Any, Mapping[str, Own], Cohort, str, str], Forward]  # (layer, tensors, cohort, module, name of the adapter)


def _times(x: torch.Tensor, own: Own, cohort: Cohort) -> torch.Tensor:
    """x [rows, n, columns] times the transpose of each row's own matrix."""
    import torch

    return x @ own.values[0].mT if own.same else torch.bmm(x, own.of(cohort.seats, cohort.lane).mT)


# --- LoRA


def _lora_slots(layer: Any, adapter: str) -> Slots | None:
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or adapter in layer.lora_variant or layer.lora_B[adapter].bias is not None:
        return None
    A = layer.lora_A[adapter]
    between = {"core": getattr(A, "core", None), "gate": getattr(layer, GATE.removeprefix("."), None)}
    found = {slot: parameter for slot, parameter in between.items() if parameter is not None}
    if len(A._forward_hooks) != len(found):  # something else stands between the factors
        return None
    return {"A": A.weight, "B": layer.lora_B[adapter].weight, **found}


def _lora(layer: Any, own: Mapping[str, Own], cohort: Cohort, module: str, adapter: str) -> Forward:
    A, B, s = own["A"], own["B"], cohort.scalings[module]
    core, gate = own.get("core"), own.get("gate")
    L, R = cohort.shifts.get(module, (None, None))

    def forward(input: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        import torch

        output: torch.Tensor = layer.base_layer(input, *args, **named)
        h = _times(cohort.by_row(layer.lora_dropout[adapter](input.float())), A, cohort)  # [rows, n, r]
        if core is not None:
            h = _times(h, core, cohort)
        if gate is not None:
            h = h * gate.of(cohort.seats, cohort.lane)[:, None]
        h = h * s[cohort.seats]
        y = cohort.by_row(output).float()
        y = y + _times(h, B, cohort) if B.same else torch.baddbmm(y, h, B.of(cohort.seats, cohort.lane).mT)
        if L is not None and R is not None:
            z = torch.bmm(cohort.by_row(input.float()), R[cohort.seats].mT)
            y = torch.baddbmm(y, z, L[cohort.seats].mT)
        return y.to(output.dtype).view(output.shape)

    return forward


# --- MiSS


def _miss_slots(layer: Any, adapter: str) -> Slots | None:
    from peft.tuners.miss.layer import MissLinear

    whole = type(layer) is MissLinear and layer.miss_block[adapter].dim() == 2  # "bat" multiplies the weights themselves
    return {"M": layer.miss_block[adapter]} if whole else None


def _miss(layer: Any, own: Mapping[str, Own], cohort: Cohort, module: str, adapter: str) -> Forward:
    M = own["M"]

    def forward(input: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        import torch
        from torch.nn import functional

        output: torch.Tensor = layer.base_layer(input, *args, **named)
        r = M.values.shape[1]
        x = layer.miss_dropout[adapter](functional.pad(input.float(), (0, -input.shape[-1] % r)))
        x = cohort.by_row(x)
        blocks = x.reshape(*x.shape[:-1], -1, r).sum(-2)  # [rows, n, r]
        m = M.of(cohort.seats, cohort.lane)  # [rows, r, d_out], or less where columns repeat
        m = m.repeat(1, 1, output.shape[-1] // m.shape[-1])
        return torch.baddbmm(cohort.by_row(output).float(), blocks, m).to(output.dtype).view(output.shape)

    return forward


# --- whole layers


def _whole(kind: str) -> Callable[[Any, str], Slots | None]:
    def slots(layer: Any, adapter: str) -> Slots | None:
        import torch

        return dict(layer.named_parameters(recurse=False)) if type(layer) is getattr(torch.nn, kind) else None

    return slots


def _linear(layer: Any, own: Mapping[str, Own], cohort: Cohort, module: str, adapter: str) -> Forward:
    weight, bias = own["weight"], own.get("bias")

    def forward(input: torch.Tensor) -> torch.Tensor:
        import torch

        x = cohort.by_row(input)
        if weight.by_row:
            y = _times(x, weight, cohort)
        else:
            grouped = x.new_zeros(len(cohort.present), cohort.most, *x.shape[1:]).index_put(cohort.places, x)  # [present, most, n, d_in]
            y = torch.bmm(grouped.flatten(1, 2), weight.of(cohort.present, cohort.lane).mT).view(*grouped.shape[:3], -1)[cohort.places]
        y = y if bias is None else y + bias.of(cohort.seats, cohort.lane)[:, None]  # [rows, n, d_out]
        return y.view(*input.shape[:-1], y.shape[-1])

    return forward


def _layer_norm(layer: Any, own: Mapping[str, Own], cohort: Cohort, module: str, adapter: str) -> Forward:
    weight, bias = own["weight"], own.get("bias")

    def forward(input: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        y = (
            cohort.by_row(functional.layer_norm(input, layer.normalized_shape, eps=layer.eps))
            * weight.of(cohort.seats, cohort.lane)[:, None]
        )
        return (y if bias is None else y + bias.of(cohort.seats, cohort.lane)[:, None]).view(input.shape)

    return forward


ADAPTERS = (Form(_lora_slots, _lora), Form(_miss_slots, _miss))
WHOLE = (Form(_whole("Linear"), _linear), Form(_whole("LayerNorm"), _layer_norm))
