"""MiSS, once called Bone: one small matrix M [r, d_out], shared over blocks of the input.

    (Delta W)[o, i] = M[i mod r, o]                       init_weights true
    Delta W block = W0 block M block + M block            "bat": W0 in r x r blocks, M [d_out / r, r, r]
    M [r, mini_r], repeated over the output               "mini"

Linear in M: averaging M averages the update, exactly. M starts at zero, no seed and no frozen basis is needed.

Paper: Kang 2024 (arXiv:2409.15371).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedpeft.adapters.plain import Plain


class Miss(Plain):
    """Matrix shard sharing (MiSS, Bone): one matrix a layer, averaged exactly."""

    peft_type: ClassVar[str] = "MISS"

    r: int = Field(8, ge=1, description="rows of the matrix, at most the layer's inputs; the rank of the update")
    mini_r: int = Field(1, ge=1, description='columns of the matrix with init_weights "mini"')
    miss_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    init_weights: Literal[True, "bat", "mini"] = Field(True, description='the form of the update: true, "bat" (Bone) or "mini"')

    @property
    def rank(self) -> int:
        """r."""
        return self.r
