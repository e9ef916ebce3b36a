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
    forwards = {torch.nn.Linear: _linear, Conv1D: _conv1d}
    output = model.get_output_embeddings()  # its products are cross_entropy.py's
    for layer in model.modules():
        if type(layer) in forwards and layer is not output and "forward" not in vars(layer) and _ours(layer.weight) and not _trains(layer):
            layer.forward = functools.partial(forwards[type(layer)], layer)


def _linear(layer: Any, input: torch.Tensor) -> torch.Tensor:
    return _of_layer(layer, input, layer.weight)


def _conv1d(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """GPT-2's, whose weight is W^T."""
    return _of_layer(layer, x, layer.weight.t())


def _of_layer(layer: Any, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.linear(x, W, layer.bias) if _trains(layer) else product(x, W, layer.bias)


def _trains(layer: Any) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def product(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., d_in] times W^T, plus b: W [d_out, d_in] and b [d_out] get no gradient."""
    import torch

    if not (gains() and _ours(x) and _ours(W) and x.numel()):
        return torch.nn.functional.linear(x, W, b)
    flat = x.reshape(-1, x.shape[-1])  # a view that is made inside the function must not be changed in place, and y may be
    y: torch.Tensor = _with_gradient().apply(flat, W, b) if x.requires_grad and torch.is_grad_enabled() else _onednn(flat, W, b)
    return y.view(*x.shape[:-1], len(W))


def _ours(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _onednn(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    import torch

    b = b if b is None else b.detach().contiguous()  # oneDNN reads a bias as if it were
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, W.detach(), b, "none", [], "")
    return found


@functools.cache
def _with_gradient() -> Any:
    import torch

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            ctx.save_for_backward(W)
            return _onednn(x, W, b)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
            (W,) = ctx.saved_tensors
            return product(gradient, W.t()), None, None

    return Product
