"""LoRA and rank-stabilised LoRA, through PEFT.

    y = W0 x + s B A x      W0 [d_out, d_in] frozen, A [r, d_in] Kaiming-uniform, B [d_out, r] zero
    s = alpha / r, or alpha / sqrt(r) with rsLoRA

Papers: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732) for rsLoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from fedpeft.adapters.adapter import Adapter
from fedpeft.adapters.ranks import Ranks, deal, highest


class Lora(Adapter):
    """Low-rank adaptation: the update of each target matrix is s B A. Averaging A and B is not averaging B A."""

    r: Ranks = Field(
        8, description="rank of the update; a list, shares {rank: share}, or {clients: {name: rank}, rest: rank} give clients their own"
    )
    lora_alpha: float = Field(16, gt=0, description="the update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    use_rslora: bool = Field(False, description="rank-stabilised scaling")
    target_modules: list[str] | str | None = Field(
        None, description='names or a regular expression of the layers to adapt, or "all-linear"; null: PEFT\'s choice for the architecture'
    )

    def peft_config(self, peft_task: str, also_saved: Sequence[str]) -> Any:
        """PEFT's LoraConfig."""
        from peft import LoraConfig

        own = {**self.model_dump(), "r": highest(self.r)}
        return LoraConfig(task_type=peft_task, bias="none", modules_to_save=list(also_saved), **own)

    @property
    def mixed_ranks(self) -> bool:
        """Clients may have different ranks."""
        return not isinstance(self.r, int)

    def ranks(self, names: Sequence[str], seed: int) -> dict[int, int]:
        """The rank of each client, where they may differ."""
        return dict(enumerate(deal(self.r, names, seed))) if self.mixed_ranks else {}
