"""The tensors of a cohort: one row of a matrix a client, and views of it by name.

values [clients, numbers]      A [clients, r, d_in], B [clients, d_out, r], ... are views of its columns

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
    """One tensor of every client, [clients, ...], or [1, ...] where all have the same; `gradients` is None where it does not train."""

    def __init__(self, values: torch.Tensor, gradients: torch.Tensor | None, by_row: bool = False) -> None:
        self.values = values
        self.gradients = gradients
        self.by_row = by_row  # gradients of the rows of a pass are put aside as `rows`, and not added up
        self.rows: torch.Tensor | None = None  # [rows of the pass, ...]
        self.reached = False  # a backward pass has come here
        if gradients is not None:
            values.requires_grad_()

    @property
    def same(self) -> bool:
        """All clients have the same, and it does not train."""
        return self.gradients is None and len(self.values) == 1

    def of(self, seats: torch.Tensor) -> torch.Tensor:
        """[seats, ...]; what the backward pass finds is added to `gradients`, or kept by row."""
        if self.same:
            return self.values.expand(len(seats), *self.values.shape[1:])
        found: torch.Tensor = self.values[seats] if self.gradients is None else _gather().apply(self.values, seats, self)
        return found

    def take(self, seats: torch.Tensor, gradient: torch.Tensor) -> None:
        """What a backward pass has found for `seats`."""
        assert self.gradients is not None
        self.reached = True
        if self.by_row:
            self.rows = gradient if self.rows is None else self.rows + gradient
        else:
            self.gradients.index_add_(0, seats, gradient)


@functools.cache
def _gather() -> Any:
    import torch

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor, seats: torch.Tensor, own: Own) -> torch.Tensor:
            ctx.seats, ctx.own = seats, own
            return values.index_select(0, seats)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
            ctx.own.take(ctx.seats, gradient)
            return None, None, None

    return Gather


class Stacked:
    """The tensors `names` of all clients of a cohort, of the largest shape that any of them has."""

    def __init__(self, clients: Sequence[Arrays], names: Sequence[str], device: str, train: bool, by_row: bool = False) -> None:
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
        self.gradients = torch.zeros_like(self.values) if train else None
        self.tensors = {name: Own(self.view(self.values, name), self._gradients(name), by_row) for name in names}

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

    def _gradients(self, name: str) -> torch.Tensor | None:
        return None if self.gradients is None else self.view(self.gradients, name)

    def read(self, row: int, names: Sequence[str]) -> Arrays:
        """A copy of one client's tensors, each of the client's own shape."""
        return {name: self.own(row, self.values, name).detach().cpu().numpy().copy() for name in names}
