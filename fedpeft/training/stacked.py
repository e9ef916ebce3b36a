"""The tensors of a cohort: one row of a matrix a client, and views of it by name.

values [clients, numbers]             A [clients, r, d_in], B [clients, d_out, r], ... are views of its columns
gradients [lanes, clients, numbers]   of what each lane (lanes.py) sends through the model; `gradient` is their sum

Clipping, FedProx, SCAFFOLD and the optimiser work on the matrix, the model on the views. A client of a smaller rank fills
the first rows of A and columns of B; the rest is zero, gets the gradient zero and stays zero.

A pass asks for the tensors of the clients that are in it, and its gradients are added to theirs in place: what a pass costs
does not grow with the cohort. Where single examples count (differential privacy), each row's gradient is kept apart instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.records import Arrays

if TYPE_CHECKING:
    import torch


class Own:
    """One tensor of every client, [clients, ...], or [1, ...] where all have the same."""

    def __init__(self, values: torch.Tensor, gradients: Sequence[torch.Tensor] = (), by_row: bool = False) -> None:
        self.values = values
        self.gradients = gradients  # of each lane, [clients, ...]; none where it does not train
        self.by_row = by_row  # gradients of the rows of a pass are put aside as `rows`, and not added up
        self.rows: dict[int, torch.Tensor] = {}  # lane -> [rows of its pass, ...]
        self.reached = False  # a backward pass has come here
        if gradients:
            values.requires_grad_()

    @property
    def same(self) -> bool:
        """All clients have the same, and it does not train."""
        return not self.gradients and len(self.values) == 1

    def of(self, seats: torch.Tensor, lane: int) -> torch.Tensor:
        """[seats, ...]; what the backward pass finds is added to the lane's `gradients`, or kept by row."""
        if self.same:
            return self.values.expand(len(seats), *self.values.shape[1:])
        found: torch.Tensor = _gather().apply(self.values, seats, lane, self) if self.gradients else self.values[seats]
        return found

    def take(self, seats: torch.Tensor, lane: int, gradient: torch.Tensor) -> None:
        """What a backward pass of a lane has found for `seats`."""
        self.reached = True
        if self.by_row:
            self.rows[lane] = self.rows[lane] + gradient if lane in self.rows else gradient
        else:
            self.gradients[lane].index_add_(0, seats, gradient)


@functools.cache
def _gather() -> Any:
    import torch

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor, seats: torch.Tensor, lane: int, own: Own) -> torch.Tensor:
            ctx.seats, ctx.lane, ctx.own = seats, lane, own
            return values.index_select(0, seats)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
            ctx.own.take(ctx.seats, ctx.lane, gradient)
            return None, None, None, None

    return Gather


class Stacked:
    """The tensors `names` of all clients of a cohort, of the largest shape that any of them has; with no `lanes` they do not train."""

    def __init__(self, clients: Sequence[Arrays], names: Sequence[str], device: str, lanes: int = 0, by_row: bool = False) -> None:
        import torch

        self.device = device
        self._shapes = [{name: arrays[name].shape for name in names} for arrays in clients]
        self._largest = {
            name: tuple(max(sizes) for sizes in zip(*(shapes[name] for shapes in self._shapes), strict=True)) for name in names
        }
        ends = np.cumsum([0, *(math.prod(shape) for shape in self._largest.values())]).tolist()
        self.columns = {name: slice(*ends[place : place + 2]) for place, name in enumerate(names)}
        self.width = ends[-1]
        self.values = self.matrix(clients)
        self.gradients = torch.zeros(lanes, *self.values.shape, device=device)
        self.tensors = {name: Own(self.view(self.values, name), [self.view(own, name) for own in self.gradients], by_row) for name in names}

    def matrix(self, clients: Sequence[Arrays]) -> torch.Tensor:
        """[clients, numbers]: those of the tensors that each of `clients` has, zero elsewhere."""
        import torch

        matrix = np.zeros((len(clients), self.width), np.float32)
        for row, arrays in zip(matrix, clients, strict=True):
            for name, shape in self._largest.items():
                if name in arrays:
                    row[self.columns[name]].reshape(shape)[tuple(map(slice, arrays[name].shape))] = arrays[name]
        return torch.from_numpy(matrix).to(self.device)

    def view(self, matrix: torch.Tensor, name: str) -> torch.Tensor:
        """The columns of a matrix [clients, numbers] that belong to a tensor, [clients, ...]."""
        return matrix[:, self.columns[name]].view(len(matrix), *self._largest[name])

    def own(self, row: int, matrix: torch.Tensor, name: str) -> torch.Tensor:
        """The part of the client in `row` of a matrix [clients, numbers] that is its tensor, of its own shape."""
        return self.view(matrix, name)[row][tuple(map(slice, self._shapes[row][name]))]

    @property
    def gradient(self) -> torch.Tensor:
        """[clients, numbers]: that of a step, once `add_up` was called."""
        return self.gradients[0]

    def add_up(self, n: int) -> None:
        """Add what the lanes have found for the first `n` clients to the first lane's."""
        for other in self.gradients[1:]:
            self.gradient[:n].add_(other[:n])

    def read(self, row: int, names: Sequence[str]) -> Arrays:
        """A copy of one client's tensors, each of the client's own shape."""
        return {name: self.own(row, self.values, name).detach().cpu().numpy().copy() for name in names}
