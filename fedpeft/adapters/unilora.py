"""Uni-LoRA: every entry of every A and B of the model is one of the d numbers of a single vector theta.

    A, B = entries theta[index] / sqrt(times the index is used),   indices random from proj_seed,   Delta W = B A

Averaging theta averages A and B, and not their product: approximately. The update is not zero at first; every client
starts from the theta that the server sends, and the indices' digest is checked.

Paper: Li et al. 2025 (arXiv:2506.00799).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain


class UniLora(Plain):
    """One trained vector for the whole model, spread over LoRA's factors: the smallest upload. Averages approximately."""

    peft_type: ClassVar[str] = "UNILORA"

    r: int = Field(4, ge=1, description="rank of the update of each layer")
    theta_d_length: int = Field(256, ge=1, description="length of the vector: all that trains besides the head")
    proj_seed: int = Field(42, ge=0, description="seed of the indices")
    init_theta_d_bound: float = Field(0.02, gt=0, description="the vector starts uniform between -this and this")
    unilora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    @property
    def rank(self) -> int:
        """r."""
        return self.r
