"""C3A: the update is made of circulant blocks, each a convolution with one trained kernel.

    Delta W = blocks C(k_ij) of block_size x block_size,   C(k) x = k * x (circular convolution),   k = 0 at first

Linear in the kernels: averages exactly. A block of 64 divides the widths of most models, which PEFT's default of 256 does not
(384 of MiniLM), and zero kernels leave the base as it is at first, which PEFT's default start does not.

Paper: Chen et al. 2024 (arXiv:2407.19342).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain


class C3a(Plain):
    """Circular convolution adaptation: d_out d_in / block_size numbers of full rank a layer. Averages exactly."""

    peft_type: ClassVar[str] = "C3A"
    always: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    block_size: int = Field(64, ge=1, description="size of a circulant block, a divisor of all adapted widths")
