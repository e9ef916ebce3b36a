"""Local optimisers by name: fresh in every round, since a client keeps nothing between rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def adamw(parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), one fused kernel for all tensors."""
    import torch

    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def sgd(parameters: Sequence[torch.nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Plain stochastic gradient descent, without momentum."""
    import torch

    return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay)


sgd.plain = True  # type: ignore[attr-defined]  # a step is the learning rate times the gradient, and nothing else
