"""Estimates as a table's cells say them."""

from __future__ import annotations

from fedpeft.intervals import Estimate


def said(found: Estimate) -> str:
    if found.mean is None:
        return "failed"
    return f"{found.mean:.4f}" + (f" ± {found.half_width:.4f}" if found.half_width is not None else "")


def signed(mean: float | None, half_width: float | None) -> str:
    return "-" if mean is None else f"{mean:+.4f}" + (f" ± {half_width:.4f}" if half_width is not None else "")
