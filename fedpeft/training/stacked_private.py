"""The steps of a cohort under example-level differential privacy: each client's batch, clipping and noise are its own.

    g_c = (sum over records i of c of g_i min(1, C_c / ||g_i||) + N(0, (sigma_c C_c)^2)) / b_c

The layers gather every row's own tensors (stacked_forms.py), so that the gradients which come back are those of single
records already. The randomness of a client is its mechanism's, asked for what `one` asks and in that order: first the batch of
a step, then its noise. A cohort that breaks and is trained again goes on where its generators are; nothing of the first
attempt is released.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.data.examples import Indices
from fedpeft.privacy.mechanism import clipping, released
from fedpeft.training.job import Job
from fedpeft.training.private import batch_size, parts
from fedpeft.training.stacked import Stacked

if TYPE_CHECKING:
    import torch


class StackedPrivacy:
    """What stands between the passes of a step and the local rules."""

    def __init__(self, config: Config, adapted: Adapted, jobs: Sequence[Job], trained: Stacked) -> None:
        import torch

        self.jobs, self.trained = jobs, trained
        self.mechanisms = [job.private for job in jobs if job.private is not None]
        assert len(self.mechanisms) == len(jobs), "clients with and without privacy do not share a cohort"
        self._C = torch.tensor([mechanism.C for mechanism in self.mechanisms], dtype=torch.float64, device=trained.device)
        self._size = batch_size(adapted, {name: adapted.parameters[name] for name in jobs[0].names}, config.training)
        self._plain_size = config.training.per_device_train_batch_size

    def parts(self, place: int) -> list[Indices]:
        """The batch of a client's next step, drawn now, in parts as `one` has them; it may be empty."""
        mechanism = self.mechanisms[place]
        return parts(self.jobs[place], mechanism, self._plain_size if mechanism.does_nothing else self._size)

    def take(self, seats: torch.Tensor, lane: int) -> None:
        """Clip the records of the pass that a lane has just made, whose clients are `seats` [rows], and add each to its client's sum."""
        import torch

        found = {name: own.rows.pop(lane) for name, own in self.trained.tensors.items() if lane in own.rows}
        with torch.no_grad():
            factors, finite = clipping(found, self._C[seats])
            for name, rows in finite.items():
                self.trained.gradients[lane][:, self.trained.columns[name]].index_add_(0, seats, rows * factors[:, None].to(rows.dtype))

    def release(self, n: int) -> None:
        """From clipped sums to what training may use, for the first `n` clients."""
        for place in range(n):
            sums = {name: self.trained.own(place, self.trained.gradient, name) for name in self.jobs[place].names}
            for name, gradient in released(self.mechanisms[place], sums).items():
                sums[name].copy_(gradient)
