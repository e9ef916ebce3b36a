"""FourierFT: the update has few Fourier coefficients, at random frequencies that all clients share.

    Delta W = scaling * Re(IDFT(F)),   F zero but for n_frequency trained coefficients, at places from random_loc_seed

Linear in the coefficients: averages exactly. They start at zero (PEFT's default would draw them). The places do not travel;
their digest is checked.

Paper: Gao et al. 2024 (arXiv:2405.03003).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain


class FourierFt(Plain):
    """A few trained Fourier coefficients of the update, at shared random frequencies. Averages exactly."""

    peft_type: ClassVar[str] = "FOURIERFT"
    always: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    n_frequency: int = Field(1000, ge=1, description="coefficients that train in each layer, at most d_out d_in")
    scaling: float = Field(150.0, gt=0, description="factor on the update")
    random_loc_seed: int = Field(777, ge=0, description="seed of the frequencies")
