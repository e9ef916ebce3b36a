"""The backbone of strategies that merge: an fp32 sum of low-rank updates beside the untouched base weights.

    y = W0 x + (sum_t L_t R_t) x + s B A x

Late joiners add up what they missed, quantised bases stay as they are, and many small merges lose nothing to a coarse dtype.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.adapters import peft_folder
from fedpeft.arrays import digest
from fedpeft.products import Product
from fedpeft.records import Arrays, Layout, merged_module

if TYPE_CHECKING:
    import torch


class Backbone:
    """What is merged, by module, applied in the forward pass of each module's base layer."""

    def __init__(self, model: Any, device: str) -> None:
        self.device = device
        self.products: dict[str, Product] = {}
        self._set_to = digest({})
        self._modules = dict(model.named_modules())
        self._hooks: list[Any] = []

    def set(self, merged: Arrays) -> None:
        """Let the backbone be the base plus exactly these factors (`records.merge_names`). The same again costs nothing."""
        import torch

        if (wanted := digest(merged)) == self._set_to:
            return
        self._set_to = wanted
        found: dict[str, list[Product]] = {}
        for left in (name for name in sorted(merged) if name.endswith(".left")):
            found.setdefault(merged_module(left), []).append(Product.of(merged[left], merged[left.removesuffix("left") + "right"]))
        self.products = {module: Product.sum(parts).compressed() for module, parts in found.items()}
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for module, product in self.products.items():
            factors = [torch.from_numpy(part.astype(np.float32)).to(self.device) for part in (product.left, product.right)]
            self._hooks.append(self._modules[module].base_layer.register_forward_hook(_adds(*factors)))


def _adds(left: torch.Tensor, right: torch.Tensor) -> Any:
    """A forward hook: output + (x R^T) L^T, in float32."""

    def hook(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + (inputs[0].float() @ right.T @ left.T).to(output.dtype)

    return hook


def as_higher_rank(folder: pathlib.Path, layout: Layout, merged: Mapping[str, Product]) -> None:
    """Rewrite a saved LoRA so that it holds the backbone's product too: B' = [B, L / s], A' = [A; R], the scaling s unchanged."""
    from safetensors.numpy import load_file

    state = load_file(folder / "adapter_model.safetensors")
    rank = max(state[pair.A].shape[0] + (merged[pair.module].rank if pair.module in merged else 0) for pair in layout.pairs)
    for pair in layout.pairs:
        A, B = state[pair.A], state[pair.B]
        A_wide, B_wide = np.zeros((rank, A.shape[1]), np.float32), np.zeros((B.shape[0], rank), np.float32)
        r = len(A)
        A_wide[:r], B_wide[:, :r] = A, B
        if pair.module in merged:
            product = merged[pair.module]
            A_wide[r : r + product.rank], B_wide[:, r : r + product.rank] = product.right, product.left / pair.s
        state[pair.A], state[pair.B] = A_wide, B_wide
    peft_folder.rewrite(folder, state, {"r": rank, "lora_alpha": layout.pairs[0].s * rank, "use_rslora": False})
