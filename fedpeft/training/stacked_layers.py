"""The model with every client's own adapter and head in it: the forward of adapted layers is replaced while `many` runs.

What each kind of layer computes stands in stacked_forms.py; here is which layers are replaced, and what they look up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.layers import forward_as
from fedpeft.records import SPARSE
from fedpeft.training.apart import mixing
from fedpeft.training.masks import UnsuitedError
from fedpeft.training.stacked import Own
from fedpeft.training.stacked_forms import ADAPTERS, WHOLE, Form

if TYPE_CHECKING:
    import torch


@dataclass
class Cohort(threading.local):
    """What the layers look up: the cohort's tensors, and who sits where in the pass that this thread has under way."""

    tensors: Mapping[str, Own]
    scalings: Mapping[str, torch.Tensor]  # LoRA module -> s [clients, 1, 1]
    shifts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # LoRA module -> L [clients, d_out, q], R [clients, q, d_in]
    seats: Any = None  # [rows], ascending: the client of every row
    present: Any = None  # the clients of the pass
    places: Any = None  # for every row, its client's place in `present` and the how-manieth of its client it is
    most: int = 0  # rows of the client that has the most
    time: int = 0  # tokens of a row, padding included
    lane: int = 0  # to which the gradients go

    def sit(self, seats: Sequence[int], time: int, device: str, lane: int = 0) -> None:
        """Make ready for a pass of this thread whose rows are those of `seats`."""
        import torch

        present, place, sizes = np.unique(seats, return_inverse=True, return_counts=True)
        numbers = np.concatenate([np.arange(size) for size in sizes])
        self.seats, self.present = (torch.tensor(found, device=device) for found in (seats, present))
        self.places = tuple(torch.tensor(found, device=device) for found in (place, numbers))
        self.most, self.time, self.lane = int(sizes.max()), time, lane

    def by_row(self, x: torch.Tensor) -> torch.Tensor:
        """x as [rows, n, features]."""
        rows = len(self.seats)
        if len(x) != rows and not (x.ndim == 2 and len(x) == rows * self.time):
            raise UnsuitedError(f"a layer sees {tuple(x.shape)}, which is not one entry a row")
        return x.reshape(rows, -1, x.shape[-1])


class Served(NamedTuple):
    """One layer that is replaced."""

    module: str
    layer: Any
    form: Form
    names: Mapping[str, str]  # what the form calls a tensor -> its name


def obstacle(adapted: Adapted) -> str | None:
    """Why the model of `adapted` cannot train many clients in one pass; None where it can."""
    if reason := mixing(adapted.model):
        return reason
    if any(name.startswith(SPARSE) for name in adapted.parameters):
        return "values train inside frozen weights"
    try:
        served(adapted)
    except UnsuitedError as error:
        return str(error)
    return None


def served(adapted: Adapted) -> list[Served]:
    """The layers whose tensors clients may have for themselves, those that rest left out. Raises UnsuitedError."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapter = adapted.model.active_adapter
    names = {id(parameter): name for name, parameter in adapted.parameters.items()}
    head = {id(adapted.parameters[name]) for name in adapted.head}
    found: list[Served] = []
    for module, layer in adapted.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if not any(id(parameter) in names for parameter in layer.parameters()):
                continue
            made = next(((form, slots) for form in ADAPTERS if (slots := form.slots(layer, adapter)) is not None), None)
            if made is None:
                raise UnsuitedError(f"{module} is no plain LoRA or MiSS on a linear layer")
        elif any(id(parameter) in head for parameter in layer.parameters(recurse=False)):
            made = next(((form, slots) for form in WHOLE if (slots := form.slots(layer, adapter)) is not None), None)
            if made is None:
                raise UnsuitedError(f"{module} trains whole, and has no stacked form")
        else:
            continue
        found.append(Served(module, layer, made[0], {slot: names[id(parameter)] for slot, parameter in made[1].items()}))
    known = {name for one in found for name in one.names.values()}
    if strangers := [name for name in adapted.parameters if name not in known]:
        raise UnsuitedError(f"{strangers[0]} belongs to a layer that has no stacked form")
    return [one for one in found if not getattr(one.layer, "_disable_adapters", False)]


@contextmanager
def stacked(adapted: Adapted, cohort: Cohort) -> Iterator[None]:
    """Let the adapted layers and the head serve `cohort` inside the block."""
    with ExitStack() as changed:
        for module, layer, form, names in served(adapted):
            own = {slot: cohort.tensors[name] for slot, name in names.items()}
            changed.enter_context(forward_as(layer, form.forward(layer, own, cohort, module, adapted.model.active_adapter)))
        yield
