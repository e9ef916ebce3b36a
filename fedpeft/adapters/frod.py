"""FRoD: all layers of one kind share a basis V, and a diagonal and a sparse matrix train in it.

    W_i = U_i diag(lambda_i) V^T exactly, V from a joint decomposition of the W_i of one kind (all query matrices, say)
    W_i' = U_i (S_i + diag(lambda_i)) V^T,   lambda_i as decomposed and S_i = 0 at first, both trained

S has sparse_rate d_in^2 values, off the diagonal, at places from projection_prng_key. The update is of full rank and linear in
(lambda, S): averaging averages it exactly, provided that all clients have the same U, V and places. Eigenvectors are free
in sign and order and differ between linear algebra libraries: the digest of the bases is part of the base's fingerprint, so
that a client with another basis is left out with that reason. S is trained with a tenth of lambda's learning rate.

Paper: AAAI 2026 (arXiv:2512.23485); the ratio of the rates is that of its experiments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain
from fedpeft.records import Arrays, Layout
from fedpeft.training.rules import Rules

S_VALUES = ".frod_lambda_s_values"


class Frod(Plain):
    """Full-rank updates in a basis shared by all layers of a kind: few floats, averaged exactly."""

    peft_type: ClassVar[str] = "FROD"
    decomposes: ClassVar[bool] = True
    always: ClassVar[Mapping[str, Any]] = {"progressbar": False}

    sparse_rate: float = Field(0.01, ge=0, le=1, description="share of the d_in^2 entries of S that train")
    regularization_alpha: float = Field(1e-3, gt=0, description="keeps the joint decomposition stable where layers are alike")
    projection_prng_key: int = Field(0, ge=0, description="seed of the places in S")
    frod_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    s_rate_factor: float = Field(0.1, ge=0, description="learning rate of S, as a share of training.learning_rate, which is lambda's")

    def peft_settings(self) -> dict[str, Any]:
        """PEFT's, without the ratio of the rates, which is ours."""
        return {name: value for name, value in super().peft_settings().items() if name != "s_rate_factor"}

    @property
    def plain_steps(self) -> bool:
        """S does not, unless its rate is set to that of the rest."""
        return self.s_rate_factor == 1

    def rules(self, layout: Layout, start: Arrays) -> Rules:
        """The slower rate of S."""
        return Rules(factors={name: self.s_rate_factor for name in layout.tensors if name.endswith(S_VALUES)})
