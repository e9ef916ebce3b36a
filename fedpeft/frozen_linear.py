"""Products with frozen float32 weights by oneDNN, where torch by itself takes slower kernels.

    y = x W^T + b,      dL/dx = (dL/dy) W,      dL/dW is never wanted

On a CPU torch multiplies float32 matrices with Intel's MKL, which keeps to its AVX2 kernels on other makers' processors, AVX-512
or not. oneDNN, which torch brings along and uses for bfloat16, has AVX-512 kernels for all of them: on an EPYC of 2024 these products
take less than half the time, in the same precision; the order of sums is another, so that last bits differ. Whether it is used follows
from the processor alone, so that runs on one machine repeat.

torch has no public call for this: `torch.ops.mkldnn._linear_pointwise` is what its compiler emits. It is touched here and nowhere
else; a torch without it computes as it always did.
"""

from __future__ import annotations

import functools
import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CPUINFO = pathlib.Path("/proc/cpuinfo")


@functools.cache
def gains() -> bool:
    """Whether this machine has something to gain: torch with MKL, on an AVX-512 processor that is not Intel's."""
    import torch

    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not libraries or torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    known = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    makers = {line.rpartition(":")[2].strip() for line in known if line.startswith("vendor_id")}
    return bool(makers) and "GenuineIntel" not in makers


def install(model: Any) -> None:
    """Let the frozen linear layers of `model` multiply here. Layers that may train, and the output layer of a language model, do not."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if not gains():
        return
    output = model.get_output_embeddings()  # its products are cross_entropy.py's
    for layer in model.modules():
        if type(layer) in (torch.nn.Linear, Conv1D) and layer is not output and not any(p.requires_grad for p in layer.parameters()):
            layer.forward = functools.partial(_forward, layer, type(layer) is Conv1D)


def _forward(layer: Any, turned: bool, input: torch.Tensor) -> torch.Tensor:
    """What the layer computes; `turned` where its weight is W^T, as GPT-2 has it."""
    W = layer.weight.t() if turned else layer.weight
    if any(p.requires_grad for p in layer.parameters(recurse=False)):
        import torch

        return torch.nn.functional.linear(input, W, layer.bias)
    return product(input, W, layer.bias)


def product(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., d_in] times W^T, plus b: W [d_out, d_in] and b [d_out] get no gradient."""
    import torch

    if not (gains() and x.dtype == W.dtype == torch.float32 and x.device.type == W.device.type == "cpu" and x.numel()):
        return torch.nn.functional.linear(x, W, b)
    flat = x.reshape(-1, x.shape[-1])  # here, so that what comes back may be changed in place
    y: torch.Tensor = _function().apply(flat, W, b) if x.requires_grad and torch.is_grad_enabled() else _onednn(flat, W, b)
    return y.view(*x.shape[:-1], len(W))


def _onednn(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    import torch

    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W.detach(), b if b is None else b.detach(), "none", [], "")
    return found


@functools.cache
def _function() -> Any:
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            ctx.save_for_backward(W)
            return _onednn(x, W, b)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            (W,) = ctx.saved_tensors
            return _onednn(gradient, W.t(), None), None, None

    return Product
