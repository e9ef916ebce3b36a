"""The frozen bases of an adapter: random projections, shared bases and index sets that every client has for itself.

VeRA's projections, FRoD's shared basis, FourierFT's frequencies do not travel: they follow from a seed in the config or from
the base weights. Averaging is meaningless where they differ, so their digest is part of the base's fingerprint, which every
message carries and every receiver compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def digest(model: Any, travelling: Collection[torch.nn.Parameter]) -> str:
    """sha256 over everything that the PEFT model holds besides its base and the `travelling` tensors; "" when that is nothing."""
    import torch

    seen, sha, some = {id(parameter) for parameter in travelling}, hashlib.sha256(), False
    for name, tensor in _held(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        some = True
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16] if some else ""


def joined(fingerprint: str, bases: str) -> str:
    """The fingerprint of a base, and of the frozen bases of the adapter on it."""
    return f"{fingerprint}.{bases}"


def pretrained(fingerprint: str) -> str:
    """Of what `joined` gave, the part that is the base's own."""
    return fingerprint.partition(".")[0]


def _held(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of the tuner and of its layers, in the order of their names; plain dicts of tensors are looked into."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    for place, module in sorted(model.named_modules(), key=lambda named: named[0]):
        if not isinstance(module, BaseTuner | BaseTunerLayer):
            continue
        for name, child in sorted(module.named_children()):
            if name not in ("model", "base_layer"):
                state = {**dict(child.named_parameters()), **dict(child.named_buffers())}
                yield from ((f"{place}.{name}.{key}", tensor) for key, tensor in sorted(state.items()) if not tensor.is_meta)
        for name, value in sorted(vars(module).items()):
            if isinstance(value, dict):
                yield from ((f"{place}.{name}.{key}", tensor) for key, tensor in sorted(value.items(), key=str) if _is_tensor(tensor))


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)
