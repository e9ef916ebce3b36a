"""Methods that put something trainable between the factors of a LoRA: y = W0 x + s B R A x, R a core [r, r].

PEFT's own LoRA layer carries the core as one more parameter of its A, applied to what A puts out. Stock PEFT knows no cores:
a saved adapter has them folded into A.
"""

from __future__ import annotations

import pathlib
from typing import Any

from fedpeft.records import Layout

CORE = ".lora_A.core"  # the end of a core's name, beside .lora_A.weight


def add_cores(model: Any) -> None:
    """Give every LoRA layer a core of zeros, and freeze its A and B."""
    import torch

    adapter = model.active_adapter
    for layer in (module for module in model.modules() if adapter in getattr(module, "lora_A", {})):
        A, B = layer.lora_A[adapter], layer.lora_B[adapter]
        A.weight.requires_grad_(False)
        B.weight.requires_grad_(False)
        A.register_parameter("core", torch.nn.Parameter(torch.zeros(A.out_features, A.out_features, device=A.weight.device)))
        A.register_forward_hook(_through_core)


def _through_core(A: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    return output @ A.core.T.to(output.dtype)


def fold(folder: pathlib.Path, layout: Layout) -> None:
    """Rewrite a saved adapter as a plain LoRA: A' = R A."""
    from safetensors.numpy import load_file, save_file

    state = load_file(folder / "adapter_model.safetensors")
    for pair in layout.pairs:
        if pair.core is not None:
            state[pair.A] = state.pop(pair.core) @ state[pair.A]
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
