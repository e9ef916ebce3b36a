"""From the starts of several clients to the `Cohort` whose layers serve them: tensors, scalings, and what each has merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.products import Product
from fedpeft.records import MERGED, Arrays, merge_names, merged_module, merged_round
from fedpeft.training.masks import UnsuitedError
from fedpeft.training.stacked import Stacked
from fedpeft.training.stacked_layers import Cohort, served

if TYPE_CHECKING:
    import torch


def seat(adapted: Adapted, starts: Sequence[Arrays], trained: Stacked | None = None) -> Cohort:
    """The clients that start from `starts`; `trained` holds those of their tensors that train.

    Sets the backbone, and switches off layers that rest, as all of `starts` have them. Raises UnsuitedError.
    """
    adapted.rest(starts[0])
    moving = trained.tensors if trained is not None else {}
    device = adapted.base.device
    tensors = dict(moving)
    frozen = sorted({name for one in served(adapted) for name in one.names.values()} - set(moving))
    alike = [name for name in frozen if _alike([start[name] for start in starts])]
    tensors |= Stacked(starts[:1], alike, device).tensors
    tensors |= Stacked(starts, [name for name in frozen if name not in alike], device).tensors
    return Cohort(tensors, scalings(adapted, starts), merge_shared(adapted, starts))


def _alike(arrays: Sequence[np.ndarray]) -> bool:
    return all(array is arrays[0] or np.array_equal(array, arrays[0]) for array in arrays)


def scalings(adapted: Adapted, starts: Sequence[Arrays]) -> dict[str, torch.Tensor]:
    """LoRA module -> s [clients, 1, 1], that of each client's rank."""
    import torch

    pairs = {pair.module: pair for pair in adapted.layout().pairs}
    found = {}
    for one in served(adapted):
        if hasattr(one.layer, "scaling"):
            pair, fixed = pairs.get(one.module), one.layer.scaling[adapted.model.active_adapter]
            s = [pair.scaling(len(start[pair.A])) if pair else fixed for start in starts]
            found[one.module] = torch.tensor(s, dtype=torch.float32, device=adapted.base.device)[:, None, None]
    return found


def merge_shared(adapted: Adapted, starts: Sequence[Arrays]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Set the backbone to what all have merged; the rest of each, by module, stacked."""
    merged = [{name: array for name, array in start.items() if name.startswith(MERGED)} for start in starts]

    def everywhere(name: str) -> bool:
        return all(name in theirs and _alike([merged[0][name], theirs[name]]) for theirs in merged)

    sides = {merge_names(merged_round(name), merged_module(name)) for name in merged[0]}
    shared = {name for both in sides if all(map(everywhere, both)) for name in both}
    adapted.backbone.set({name: merged[0][name] for name in shared})
    modules = sorted({merged_module(name) for arrays in merged for name in arrays if name not in shared})
    if strangers := set(modules) - {pair.module for pair in adapted.layout().pairs}:
        raise UnsuitedError(f"clients have merged their own into {min(strangers)}, which has no adapter")
    own = [{name: array for name, array in arrays.items() if name not in shared} for arrays in merged]
    return {module: shifts(adapted, starts[0], own, module) for module in modules}


def shifts(adapted: Adapted, start: Arrays, own: Sequence[Arrays], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """L [clients, d_out, q] and R [clients, q, d_in] of what each client alone has merged into `module`."""
    pair = next(pair for pair in adapted.layout().pairs if pair.module == module)
    rows, columns = start[pair.B].shape[0], start[pair.A].shape[1]
    factors: list[Arrays] = []
    for arrays in own:
        lefts = [name for name in sorted(arrays) if name.endswith(".left") and merged_module(name) == module]
        parts = [Product.of(arrays[left], arrays[left.removesuffix("left") + "right"]) for left in lefts]
        whole = Product.sum([*parts, Product(np.zeros((rows, 0)), np.zeros((0, columns)))]).compressed()
        factors.append({"L": whole.left, "R": whole.right})
    stack = Stacked(factors, ("L", "R"), adapted.base.device).tensors
    return stack["L"].values, stack["R"].values
