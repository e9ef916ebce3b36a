"""VB-LoRA: the factors of all layers are put together from one bank of vectors that they share.

    every sub-vector of A and B = sum over its topk largest logits of softmax(logits) h_j,   h_j in a bank [num_vectors, vector_length]

The mixture is not linear: averages approximately. A length of 64 divides the widths of most models, which PEFT's default of 256
does not (384 of MiniLM).

Paper: Li, Han and Ji 2024 (arXiv:2405.15179).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain


class VbLora(Plain):
    """LoRA's factors from one shared bank of vectors, mixed by trained logits. Averages approximately."""

    peft_type: ClassVar[str] = "VBLORA"

    r: int = Field(4, ge=1, description="rank of the update")
    num_vectors: int = Field(256, ge=2, description="vectors in the bank")
    vector_length: int = Field(64, ge=1, description="numbers of a vector, a divisor of all adapted widths")
    topk: int = Field(2, ge=1, description="vectors that are mixed for a sub-vector")
    vblora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
