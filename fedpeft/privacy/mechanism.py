"""One step of DP-SGD on rows of per-example gradients: clip each record, add up, add noise, divide by the expected batch.

    g = (sum_i g_i min(1, C / ||g_i||) + N(0, (sigma C)^2)) / b,   b = q n, whatever the batch turned out to be

The norm is over all trained tensors of a record together. A record whose gradient is not finite counts as zero: constant
replacement keeps the sensitivity at C. An empty batch releases noise alone and is a step like any other.

Paper: Abadi et al. 2016 (arXiv:1607.00133), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpeft.privacy.noise import Noise, gaussian


@dataclass(frozen=True)
class Mechanism:
    """What every step of a client's turn does."""

    sigma: float  # noise multiplier
    C: float  # clipping norm
    q: float  # probability of a record to take part
    batch: float  # b = q n, the expected batch
    noise: Noise

    @property
    def does_nothing(self) -> bool:
        """Clipping and noise are the identity: sigma = 0 and C infinite. What is left is the sampling, and 1 / b."""
        return self.sigma == 0 and math.isinf(self.C)


def clipping(rows: Mapping[str, Any], C: Any) -> tuple[Any, dict[str, Any]]:
    """From rows [batch, ...] and C, one number or [batch]: the factors min(1, C / ||g_i||) [batch], zero for records that are
    not finite, and by parameter the rows that they multiply, [batch, numbers], zero where they are not finite."""
    import torch

    flat = {name: row.reshape(len(row), -1) for name, row in rows.items()}
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1).double() for row in flat.values()]).square().sum(dim=0).sqrt()  # [batch]
    if not torch.isfinite(norms).all():  # a number is not finite, or too large for float32 when squared
        norms = torch.stack([row.double().square().sum(dim=1) for row in flat.values()]).sum(dim=0).sqrt()
    factors = torch.where(torch.isfinite(norms), (C / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(max=1.0), 0.0)
    whole = torch.isfinite(factors * norms)[:, None]
    if whole.all():
        return factors, flat
    return factors, {name: torch.where(whole & torch.isfinite(row), row, 0.0) for name, row in flat.items()}


def clipped_sum(rows: Mapping[str, Any], C: float) -> dict[str, Any]:
    """sum_i g_i min(1, C / ||g_i||) by parameter, from rows [batch, ...]; records that are not finite are left out."""
    factors, finite = clipping(rows, C)
    return {name: (factors.to(row.dtype) @ row).reshape(rows[name].shape[1:]) for name, row in finite.items()}


def released(mechanism: Mechanism, total: Mapping[str, Any]) -> dict[str, Any]:
    """The noisy mean from a clipped sum: what training may use."""
    import torch

    found = {}
    for name, value in sorted(total.items()):
        drawn = gaussian(mechanism.noise, value.numel()) * (mechanism.sigma * mechanism.C) if mechanism.sigma else None
        noisy = value if drawn is None else value + torch.from_numpy(drawn).to(value.device, value.dtype).reshape(value.shape)
        found[name] = noisy / mechanism.batch
    return found
