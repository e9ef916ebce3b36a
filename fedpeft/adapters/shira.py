"""SHiRA: some entries of the weight itself train, as many as LoRA of rank r has numbers; the rest is frozen.

    Delta W = values at the places of a mask with r (d_out + d_in) entries

    random    places drawn from random_seed
    columns   whole input columns drawn from random_seed, as PaCA trains them, the last one in part

Linear in the values: averages exactly. The places do not travel; their digest is checked.

Papers: Bhardwaj et al. 2024 (arXiv:2406.13175); Woo et al. 2025 (arXiv:2503.01905) for PaCA, whose saving of activations
is not in this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fedpeft.adapters.plain import Plain

if TYPE_CHECKING:
    import torch


class Shira(Plain):
    """Sparse high-rank adaptation: chosen entries, or columns (PaCA), of the weight train. Averages exactly."""

    peft_type: ClassVar[str] = "SHIRA"

    r: int = Field(8, ge=1, description="r (d_out + d_in) entries train in each layer, as many as LoRA of rank r has")
    mask: Literal["random", "columns"] = Field("random", description="which entries")
    random_seed: int = Field(0, ge=0, description="seed of the places")

    def peft_settings(self) -> dict[str, Any]:
        """PEFT's, without the mask, which is a function there."""
        return {"r": self.r, "random_seed": self.random_seed, "target_modules": self.target_modules}

    def peft_config(self, peft_task: str | None, also_saved: Sequence[str]) -> Any:
        """PEFT's config, with our mask of columns where it is wanted."""
        config = super().peft_config(peft_task, also_saved)
        if self.mask != "random":
            config.mask_fn = columns
        return config


def columns(layer: torch.nn.Linear, r: int, random_seed: int, **others: Any) -> torch.Tensor:
    """A mask [d_out, d_in] of r (d_out + d_in) ones that fill whole columns, in a random order, the last one from its top."""
    import torch

    d_out, d_in = layer.weight.shape
    entries = r * (d_out + d_in)
    order = torch.randperm(d_in, generator=torch.Generator().manual_seed(random_seed))
    mask = torch.zeros(d_in, d_out)
    mask[order] = (torch.arange(d_in * d_out) < entries).float().view(d_in, d_out)
    return mask.T.contiguous().to(layer.weight.device)
