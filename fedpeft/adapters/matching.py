"""What an adapter's `target_modules` match, seen on a model without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpeft.errors import Problem, UserError

EVERYWHERE = "all-linear"  # PEFT's word, which leaves the head out by itself


def check_head(config: Any, head: Sequence[str]) -> None:
    """Raises UserError when targets that a person gave match linear layers of the `head` too, which is trained whole."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = getattr(config, "target_modules", None)
    matched = [name for name in head if targets and targets != EVERYWHERE and check_target_module_exists(config, name)]
    if matched:
        got = f"{_said(targets)} also matches {', '.join(matched)} in the head, which is trained whole"
        raise UserError(
            Problem("adapter.target_modules", got, do="use a regular expression with the encoder's path, such as '.*layer.*dense'")
        )


def check_rank(model: Any, rank: int | None, head: Sequence[str]) -> None:
    """Raises UserError when `rank` is more than an adapted matrix outside the `head` can have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if rank is None:
        return
    for name, layer in model.named_modules():
        short = name.removeprefix("base_model.model.")
        if isinstance(layer, BaseTunerLayer) and short not in head:
            sizes = [getattr(layer, size, None) for size in ("in_features", "out_features")]
            smallest = min((size for size in sizes if isinstance(size, int)), default=rank)
            if rank > smallest:
                got = f"{rank} is more than the {smallest} rows or columns of {short}"
                raise UserError(Problem("adapter.r", got, f"at most {smallest}"))


def _said(targets: Any) -> str:
    return targets if isinstance(targets, str) else ", ".join(sorted(targets))
