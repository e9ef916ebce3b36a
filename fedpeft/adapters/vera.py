"""VeRA: frozen random A and B, shared by all layers of a shape; two vectors a layer train.

    Delta W = diag(b) B diag(d) A,   B [d_out, r] and A [r, d_in] from projection_prng_key,   b = 0, d = d_initial at first

Bilinear in b and d: averages approximately. The projections do not travel; their digest is checked.

Paper: Kopiczko, Blankevoort and Asano 2024 (arXiv:2310.11454).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain


class Vera(Plain):
    """Vector-based random matrix adaptation: two vectors a layer on shared random projections. Averages approximately."""

    peft_type: ClassVar[str] = "VERA"

    r: int = Field(256, ge=1, description="rank of the random projections")
    projection_prng_key: int = Field(0, ge=0, description="seed of the random projections")
    vera_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    d_initial: float = Field(0.1, description="start of the vector d")
