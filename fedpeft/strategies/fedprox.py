"""FedProx: clients are held near what they were sent.

    g <- g + mu (theta - theta_g)      the gradient of mu/2 ||theta - theta_g||^2, over all tensors that train

The term acts on the factors, not on their product, and is added after the clipping of the data's gradient.

Paper: Li et al. 2020 (arXiv:1812.06127), algorithm 2.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedpeft.strategies.over import Over
from fedpeft.strategies.strategy import Round


class FedProx(Over):
    """A proximal term in every local step."""

    paper: ClassVar[str] = "arXiv:1812.06127"
    from_mean: ClassVar[bool] = True

    mu: float = Field(0.01, gt=0, description="strength of the pull; large values freeze the clients")

    def proximal(self, at: Round) -> float:
        """mu."""
        return self.mu
