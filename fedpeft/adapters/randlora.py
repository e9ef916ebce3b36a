"""RandLoRA: an update of full rank as a sum of frozen random low-rank matrices with trained diagonals.

    Delta W = s sum_j B_j diag(lambda_j) A diag(gamma_j),   s = randlora_alpha / r,   j = 1 .. ceil(d_in / r)

Bilinear in lambda and gamma: averages approximately. PEFT draws the bases in bfloat16 or float16 as the hardware has it, so
that the same key may give other bases on other machines: they do not travel, their digest is checked.

Paper: Albert et al. 2025 (arXiv:2502.00987).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain


class RandLora(Plain):
    """Full-rank updates from scaled random low-rank bases. Averages approximately."""

    peft_type: ClassVar[str] = "RANDLORA"

    r: int = Field(32, ge=1, description="rank of each random basis; smaller means more of them, and more that trains")
    randlora_alpha: int = Field(640, ge=1, description="the update is scaled by randlora_alpha / r")
    projection_prng_key: int = Field(0, ge=0, description="seed of the random bases")
    sparse: bool = Field(False, description="sparse ternary bases")
    very_sparse: bool = Field(False, description="sparser ternary bases")
    randlora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    @property
    def rank(self) -> int:
        """Of one basis."""
        return self.r
