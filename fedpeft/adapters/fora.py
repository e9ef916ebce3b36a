"""FoRA: LoRA in the most sensitive layers alone, with a factor that stays orthonormal.

    F_l = sum_k n_k F_l,k / sum_k n_k,   F_l,k = mean over client k's examples of sum_{theta in layer l} ||grad_theta loss||^2
    y = W0 x + s g B A x,   B [d_out, r] with B^T B = I,   A [r, d_in] normal with deviation 1 / sqrt(r),   g one number, 0 at first

Before round 1 the clients score the layers of the frozen base (the diagonal Fisher information, summed over a layer); the
upper half is adapted, the other layers neither train nor travel. B trains by Cayley-Adam (training/stiefel.py), A and g by
the run's optimiser. A's singular values are those of B A.

The mean of orthonormal matrices is none. After a round the server takes its polar decomposition, which loses nothing:

    B = U H,  U = V1 V2^T, H = V2 S V2^T for B = V1 S V2^T;   B <- U,  A <- H A;   B A as before

What is left is the cross-covariance of averaging factors, as with LoRA. The exported folder is plain LoRA with A <- g A.

Paper: Fisher-orthogonal rank adaptation, 2026 (arXiv:2605.29317), centralised. Its code squares the gradient of a batch where
the paper squares that of an example: `score: batch` does as the code. Its rate for B is five times that for A.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fedpeft import seeds
from fedpeft.adapters import peft_folder
from fedpeft.adapters.adapted import A_FACTOR, B_FACTOR, Adapted
from fedpeft.adapters.layers import layer_of
from fedpeft.adapters.lora import LoraLike
from fedpeft.errors import Problem, UserError
from fedpeft.records import BESIDE, Arrays, Layout
from fedpeft.training.layer_scores import LayerScores
from fedpeft.training.rules import Rules

if TYPE_CHECKING:
    import torch

    from fedpeft.base import Base

CHOICE = f"{BESIDE}fora_layers"
"""The global tensor [2, layers] with the layers' scores, and 1 for those that are adapted."""

GATE = ".fora_gate"

Stacked = tuple[str, int]


class Fora(LoraLike):
    """Fisher-orthogonal rank adaptation: the most sensitive layers only, B orthonormal throughout, half of LoRA's parameters."""

    r: int = Field(8, ge=1, description="rank of the update")
    layers: float = Field(
        0.5, gt=0, le=1, description="share of the layers that is adapted, those with the highest scores; 1: all, unscored"
    )
    score: Literal["example", "batch"] = Field(
        "example", description="whose gradients are squared: an example's (paper) or a batch's (code)"
    )
    score_examples: int = Field(3, ge=1, description="examples that each client scores the layers on")
    orthonormal: bool = Field(True, description="false: plain LoRA in the chosen layers")
    b_rate_factor: float = Field(5.0, gt=0, description="learning rate of B on the manifold, as a multiple of training.learning_rate")

    @property
    def rank(self) -> int:
        """r."""
        return self.r

    def check(self, skeleton: Any, peft_task: str | None) -> None:
        """As every adapter; there must be layers."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        super().check(skeleton, peft_task)
        tuned = [name for name, module in skeleton.named_modules() if isinstance(module, BaseTunerLayer)]
        if not any(layer_of(name) for name in tuned):
            got = f"fora has no layers to choose from: the targets ({', '.join(tuned[:3])}) lie outside of all"
            raise UserError(Problem("adapter.target_modules", got, do="name modules inside the transformer layers, or use adapter lora"))

    def survey(self) -> Any:
        """The layers' scores, where there is a choice to make."""
        return LayerScores(self.score_examples, self.score == "batch", self.layers, CHOICE, stacks) if self.layers < 1 else None

    def attach(self, base: Base, peft_task: str | None, seed: int, train_head: bool) -> Adapted:
        """As every adapter; then B is drawn orthonormal, and a gate at zero is laid on A."""
        import torch

        adapted = super().attach(base, peft_task, seed, train_head)
        if not self.orthonormal:
            return adapted
        gates = {}
        modules = dict(adapted.model.named_modules())
        with seeds.torch_seed(seeds.derive(seed, "fora")), torch.no_grad():
            for module in _modules(adapted.parameters):
                A, B = adapted.parameters[module + A_FACTOR], adapted.parameters[module + B_FACTOR]
                A.copy_(torch.randn(A.shape) / self.r**0.5)
                Q, R = torch.linalg.qr(torch.randn(B.shape, dtype=torch.float64))
                B.copy_(Q * R.diagonal().sign())
                gates[module + GATE] = gate = torch.nn.Parameter(torch.zeros(1, device=B.device))
                modules[module].lora_A[adapted.model.active_adapter].register_forward_hook(_times(gate))
        adapted.add(gates)
        return adapted

    def resting(self, layout: Layout, arrays: Arrays) -> frozenset[str]:
        """What belongs to layers that were not chosen."""
        if CHOICE not in arrays:
            return frozenset()
        left_out = {layer for layer, adapts in zip(stacks(layout), arrays[CHOICE][1], strict=True) if not adapts}
        return frozenset(name for name in layout.tensors if name not in layout.head and layer_of(name) in left_out)

    @property
    def plain_steps(self) -> bool:
        """B does not, unless it may leave the manifold."""
        return not self.orthonormal

    def rules(self, layout: Layout, start: Arrays) -> Rules:
        """B on the manifold, at its own rate."""
        if not self.orthonormal:
            return Rules()
        on_manifold = frozenset(module + B_FACTOR for module in _modules(layout.tensors))
        return Rules(factors=dict.fromkeys(on_manifold, self.b_rate_factor), orthonormal=on_manifold)

    def settle(self, arrays: Arrays, layout: Layout) -> Arrays:
        """B <- U, A <- H A, of every layer that trains."""
        resting, settled = self.resting(layout, arrays), dict(arrays)
        for module in _modules(layout.tensors) if self.orthonormal else ():
            A, B = module + A_FACTOR, module + B_FACTOR
            if B not in resting:
                V1, S, V2t = np.linalg.svd(arrays[B].astype(np.float64), full_matrices=False)
                settled[B] = (V1 @ V2t).astype(arrays[B].dtype)
                settled[A] = ((V2t.T * S) @ (V2t @ arrays[A])).astype(arrays[A].dtype)
        return settled

    def report(self, layout: Layout, arrays: Arrays) -> dict[str, Any]:
        """Every layer with its score and whether it was chosen."""
        if CHOICE not in arrays:
            return {}
        rows = zip(stacks(layout), *arrays[CHOICE], strict=True)
        return {
            "layers": [
                {"stack": stack.removeprefix("base_model.model."), "layer": number, "score": float(f), "adapted": bool(on)}
                for (stack, number), f, on in rows
            ]
        }

    def export(self, folder: pathlib.Path, adapted: Adapted) -> None:
        """Plain LoRA in the chosen layers, the gate within A."""
        kept = [module for module in _modules(adapted.parameters) if module + B_FACTOR not in adapted.resting]
        arrays = adapted.read()
        tensors = {name: arrays[name] for name in adapted.head}
        for module in kept:
            gate = arrays.get(module + GATE, np.float32(1))
            tensors |= {module + A_FACTOR: gate * arrays[module + A_FACTOR], module + B_FACTOR: arrays[module + B_FACTOR]}
        peft_folder.rewrite(folder, tensors, {"target_modules": [module.removeprefix("base_model.model.") for module in kept]})


def stacks(layout: Layout) -> list[Stacked]:
    """The adapted layers in a fixed order: path of the stack, number."""
    return sorted({layer for name in layout.tensors if name not in layout.head and (layer := layer_of(name))})


def _modules(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    return sorted(name.removesuffix(B_FACTOR) for name in names if name.endswith(B_FACTOR))


def _times(gate: torch.Tensor) -> Any:
    """A forward hook: gate * output."""

    def hook(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return gate * output

    return hook
