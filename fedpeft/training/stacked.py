"""The tensors of a cohort: one row of a matrix a client, and views of it by name.

values [clients, numbers]      A [clients, r, d_in], B [clients, d_out, r], ... are views of its columns

Clipping, FedProx, SCAFFOLD and the optimiser work on the matrix, the model on the views. A client of a smaller rank fills
the first rows of A and columns of B; the rest is zero, gets the gradient zero and stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.records import Arrays

if TYPE_CHECKING:
    import torch


class Stacked:
    """The tensors `names` of all clients of a cohort, of the largest shape that any of them has."""

    def __init__(self, clients: Sequence[Arrays], names: Sequence[str], device: str) -> None:
        self.device = device
        self._shapes = [{name: arrays[name].shape for name in names} for arrays in clients]
        self._largest = {
            name: tuple(max(sizes) for sizes in zip(*(shapes[name] for shapes in self._shapes), strict=True)) for name in names
        }
        ends = np.cumsum([0, *(math.prod(shape) for shape in self._largest.values())]).tolist()
        self._columns = {name: slice(*ends[place : place + 2]) for place, name in enumerate(names)}
        self.width = ends[-1]
        self.values = self.matrix(clients)
        self.tensors = {name: self._view(self.values, name) for name in names}

    def matrix(self, clients: Sequence[Arrays]) -> torch.Tensor:
        """[clients, numbers]: those of the tensors that each of `clients` has, zero elsewhere."""
        import torch

        matrix = np.zeros((len(clients), self.width), np.float32)
        for row, arrays in zip(matrix, clients, strict=True):
            for name, shape in self._largest.items():
                if name in arrays:
                    row[self._columns[name]].reshape(shape)[tuple(map(slice, arrays[name].shape))] = arrays[name]
        return torch.from_numpy(matrix).to(self.device)

    def _view(self, matrix: torch.Tensor, name: str) -> torch.Tensor:
        return matrix[:, self._columns[name]].view(len(matrix), *self._largest[name])

    def take_gradients(self) -> torch.Tensor:
        """[clients, numbers]: what the backward passes have added up since this was last asked."""
        import torch

        found = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in self.tensors.values()]
        for tensor in self.tensors.values():
            tensor.grad = None
        return torch.cat([gradient.flatten(1) for gradient in found], dim=1)

    def read(self, row: int) -> Arrays:
        """A copy of one client's tensors, each of the client's own shape."""
        values = self.values[row].detach().cpu().numpy()
        found = {name: values[self._columns[name]].reshape(shape) for name, shape in self._largest.items()}
        return {name: array[tuple(map(slice, self._shapes[row][name]))].copy() for name, array in found.items()}
