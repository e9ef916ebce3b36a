"""Cross-entropy over a large vocabulary of which only a few rows of logits ever stand in memory.

    z_i = W h_i + b,  z_i <- c tanh(z_i / c) where the model caps its logits;   L_i = log sum_v exp z_iv - z_iy
    dL_i / dh_i = sum_v (softmax(z_i)_v - [v = y_i]) (1 - (z_iv / c)^2) w_v

The gradient of a position depends on that position alone, so it is made in the forward pass, chunk by chunk, while its logits
are there: [n, d] numbers are kept where the plain loss keeps [n, V], and no logit is computed twice. W and b are the frozen
output layer's and get no gradient.

Paper: the reordering is that of Wijmans et al. 2024 (arXiv:2411.09009) without its fused kernels and its filter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedpeft import frozen_linear

if TYPE_CHECKING:
    import torch

MOST = 2**24  # logits at a time: 64 MB in float32


@dataclass(frozen=True)
class OutputLayer:
    """The frozen layer from hidden states to logits, and what the model does to these."""

    weight: torch.Tensor  # [V, d]
    bias: torch.Tensor | None  # [V]
    softcap: float | None


class _Reached(Exception):
    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def output_layer(model: Any) -> OutputLayer | None:
    """That of a causal model; None where it is adapted, trained, or followed by something that `chunked` does not know."""
    import torch

    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(layer) is not torch.nn.Linear or "forward" in vars(layer) or any(p.requires_grad for p in layer.parameters()):
        return None
    done = {name: value for name, value in vars(config).items() if "logit" in name or name.startswith("lm_head")}
    done.pop("attn_logit_softcapping", None)  # inside the layers
    softcap = done.pop("final_logit_softcapping", None)
    if any(isinstance(value, int | float) and not isinstance(value, bool) and value != 1 for value in done.values()):
        return None
    return OutputLayer(layer.weight, layer.bias, softcap)


def hidden_states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What enters the output layer, [batch, time, d], with its gradient; the layer itself is not reached."""

    def stop(layer: Any, given: tuple[torch.Tensor, ...]) -> None:
        raise _Reached(given[0])

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _Reached as reached:
        return reached.hidden
    finally:
        hook.remove()
    raise AssertionError("the model does not call its output layer")


def chunked(hidden: torch.Tensor, layer: OutputLayer, labels: torch.Tensor, most: int = MOST) -> tuple[torch.Tensor, torch.Tensor]:
    """(the loss of each position [n], float32, differentiable in `hidden`; the likeliest entry of each [n]).

    hidden [n, d], labels [n] in 0..V-1; at most `most` logits stand at a time, but those of one position at least.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _function().apply(hidden, layer, labels, max(1, most // len(layer.weight)))
    return found


@functools.cache
def _function() -> Any:
    import torch

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: torch.Tensor, layer: OutputLayer, labels: torch.Tensor, size: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            losses, likeliest = hidden.new_empty(len(hidden), dtype=wide), torch.empty_like(labels)
            pulls = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # dL_i / dh_i
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                z = frozen_linear.product(hidden[rows], layer.weight, layer.bias).to(wide)  # [size, V]
                slope = None
                if layer.softcap is not None:
                    z = z.div_(layer.softcap).tanh_()
                    slope = 1 - z.square() if pulls is not None else None
                    z = z.mul_(layer.softcap)
                likeliest[rows] = z.argmax(dim=1)
                top, own = z.logsumexp(dim=1, keepdim=True), labels[rows, None]
                losses[rows] = (top - z.gather(1, own))[:, 0]
                if pulls is not None:
                    p = z.sub_(top).exp_().scatter_add_(1, own, z.new_full((), -1.0).expand_as(own))
                    p = p if slope is None else p.mul_(slope)
                    pulls[rows] = frozen_linear.product(p.to(layer.weight.dtype), layer.weight.t())
            ctx.save_for_backward(pulls)
            ctx.mark_non_differentiable(likeliest)
            return losses, likeliest

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
            (pulls,) = ctx.saved_tensors
            return None if pulls is None else (gradients[0][:, None] * pulls).to(pulls.dtype), None, None, None

    return Chunked
