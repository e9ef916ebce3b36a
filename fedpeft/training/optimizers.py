"""Local optimisers by name: fresh in every round, since a client keeps nothing between rounds.

Each has two forms: torch's own over groups of parameters, for one client, and `Stacked...`, the same rule on a matrix with
one row a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.999)
EPS = 1e-8


def adamw(groups: Sequence[dict[str, Any]], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), one fused kernel for all tensors."""
    import torch

    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True)


def sgd(groups: Sequence[dict[str, Any]], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Plain stochastic gradient descent, without momentum."""
    import torch

    return torch.optim.SGD(groups, lr=learning_rate, weight_decay=weight_decay)


sgd.plain = True  # type: ignore[attr-defined]  # a step is the learning rate times the gradient, and nothing else


class StackedAdamW:
    """`adamw` for many clients.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   x <- (1 - rate decay) x - rate m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
    """

    def __init__(self, values: torch.Tensor, weight_decay: float) -> None:
        import torch

        self.weight_decay = weight_decay
        self.m, self.v = torch.zeros_like(values), torch.zeros_like(values)
        self.t = 0

    def step(self, values: torch.Tensor, gradients: torch.Tensor, rates: torch.Tensor) -> None:
        """Move the first clients by their gradients [clients, numbers] at their rates [clients, 1]; the others have finished."""
        self.t += 1
        m, v = self.m[: len(values)], self.v[: len(values)]
        m.lerp_(gradients, 1 - BETAS[0])
        v.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        root = v.sqrt().div_((1 - BETAS[1] ** self.t) ** 0.5).add_(EPS)
        if self.weight_decay:
            values.mul_(1 - rates * self.weight_decay)
        values.addcmul_(m / root, rates, value=-1 / (1 - BETAS[0] ** self.t))


class StackedSgd:
    """`sgd` for many clients: x <- x - rate (g + decay x)."""

    def __init__(self, values: torch.Tensor, weight_decay: float) -> None:
        self.weight_decay = weight_decay

    def step(self, values: torch.Tensor, gradients: torch.Tensor, rates: torch.Tensor) -> None:
        """Move the first clients by their gradients [clients, numbers] at their rates [clients, 1]; the others have finished."""
        values.addcmul_(gradients.add(values, alpha=self.weight_decay), rates, value=-1)
