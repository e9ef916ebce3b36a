"""LN-Tuning: the base's own layer norms train, each client's from the server's.

    Delta gamma, Delta beta of every norm; no matrix changes

Linear in what trains: averages exactly. PEFT knows the norms of a few architectures by name; the default here finds those of any
model whose norms are called norms.

Paper: Zhao et al. 2023 (arXiv:2312.11420).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedpeft.adapters.plain import Plain

NORMS = r"(?i).*(norm\w*|\bln_\w+)"


class LnTuning(Plain):
    """The layer norms of the base train, and nothing is added. Averages exactly."""

    peft_type: ClassVar[str] = "LN_TUNING"

    target_modules: list[str] | str = Field(NORMS, description="names of the norms, or a regular expression for whole names")
