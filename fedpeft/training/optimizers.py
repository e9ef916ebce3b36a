"""Local optimisers by name, over groups of parameters: fresh in every round, since a client keeps nothing between rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def adamw(groups: Sequence[dict[str, Any]], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), one fused kernel for all tensors."""
    import torch

    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay, fused=True)


def sgd(groups: Sequence[dict[str, Any]], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Plain stochastic gradient descent, without momentum."""
    import torch

    return torch.optim.SGD(groups, lr=learning_rate, weight_decay=weight_decay)
