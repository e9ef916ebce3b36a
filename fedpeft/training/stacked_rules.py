"""From the clients' gradients to their next values: what `one` does to a client's step, on one matrix with a row a client.

    g <- (g + mu (theta - theta_start) + penalty) M + drift;   theta <- optimiser(theta, g)

Columns that stay orthonormal are the matrix's last ones, and go by Cayley-Adam, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.config import Config
from fedpeft.lookup import find
from fedpeft.records import Layout
from fedpeft.training.job import Job
from fedpeft.training.stacked import Stacked

if TYPE_CHECKING:
    import torch


def order(job: Job) -> list[str]:
    """The trained tensors in the order that `StackedRules` wants them to have."""
    return sorted(job.names, key=lambda name: name in job.rules.orthonormal)


class StackedRules:
    """The local rules of all clients of a cohort, and their optimisers. Rules of tensors are the same for all but in their numbers."""

    def __init__(self, config: Config, layout: Layout, jobs: Sequence[Job], trained: Stacked) -> None:
        import torch

        from fedpeft.training.stiefel import StackedCayleyAdam

        self.trained, self.layout = trained, layout
        values, rules, device = trained.values, jobs[0].rules, trained.device
        self._pulls = torch.tensor([[job.proximal] for job in jobs], device=device)
        self._anchors = values.clone() if self._pulls.any() else None
        self._drifts = trained.matrix([job.drift for job in jobs]) if any(job.drift for job in jobs) else None
        self._multipliers = {
            name: torch.from_numpy(np.stack([job.rules.multipliers[name] for job in jobs])).to(device)
            for name in jobs[0].names
            if name in rules.multipliers
        }
        self._tails = torch.tensor([job.tail[0] for job in jobs], device=device)[:, None, None]  # lambda
        self._cuts = {
            pair.module: torch.tensor([round(job.tail[1] * len(job.start[pair.A])) for job in jobs], device=device)
            for pair in (layout.pairs if self._tails.any() else ())
        }
        self._bound = [name for name in order(jobs[0]) if name in rules.orthonormal]
        self._usual = trained.columns[self._bound[0]].start if self._bound else trained.width  # columns of the run's own optimiser
        self._factors = {name: rules.factors.get(name, 1.0) for name in jobs[0].names}
        self._optimizer = find("stacked_optimizer", config.training.optimizer)(values[:, : self._usual], config.training.weight_decay)
        self._cayley = {name: StackedCayleyAdam(trained.view(values, name)) for name in self._bound}
        self._scale = torch.ones(1, trained.width if rules.factors else 1, device=device)
        for name in set(rules.factors) & set(jobs[0].names):
            trained.view(self._scale, name).fill_(self._factors[name])

    def step(self, n: int, rates: torch.Tensor) -> None:
        """Move the first `n` clients by their gradients, at the rates [n, 1] of their schedules."""
        values, g = self.trained.values[:n], self.trained.gradient[:n]
        if self._anchors is not None:
            g.addcmul_(values - self._anchors[:n], self._pulls[:n])
        if self._cuts:
            self._shrink_tails(values, g)
        for name, M in self._multipliers.items():
            own = self.trained.view(g, name)
            own.copy_(own @ M[:n])
        if self._drifts is not None:
            g.add_(self._drifts[:n])
        if self._usual:
            self._optimizer.step(values[:, : self._usual], g[:, : self._usual], rates * self._scale[:, : self._usual])
        for name, optimizer in self._cayley.items():
            optimizer.step(self.trained.view(values, name), self.trained.view(g, name), (rates * self._factors[name])[:, :, None])

    def _shrink_tails(self, values: torch.Tensor, g: torch.Tensor) -> None:
        """Add the gradients of lambda ||A[c:]|| ||B[:, c:]||, c each client's own."""
        import torch

        n = len(values)
        for pair in self.layout.pairs:
            A, B = self.trained.view(values, pair.A), self.trained.view(values, pair.B)
            tail = torch.arange(A.shape[1], device=A.device) >= self._cuts[pair.module][:n, None]  # [n, r]
            A, B = A * tail[:, :, None], B * tail[:, None, :]
            a, b = (side.square().sum((1, 2), keepdim=True).sqrt() for side in (A, B))
            pull = torch.where((a > 0) & (b > 0), self._tails[:n], 0.0)
            self.trained.view(g, pair.A).add_(A * (pull * b / a.clamp(min=torch.finfo(a.dtype).tiny)))
            self.trained.view(g, pair.B).add_(B * (pull * a / b.clamp(min=torch.finfo(b.dtype).tiny)))
