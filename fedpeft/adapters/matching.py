"""What an adapter's `target_modules` match, seen on a model without weights."""

from __future__ import annotations

from typing import Any

from fedpeft.base import KEPT_BY_PEFT
from fedpeft.errors import Problem, UserError


def check_matches(model: Any, rank: int | None) -> None:
    """Raises UserError when the adapter sits in the head too, or when its rank is more than a matched matrix can have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tuned = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    in_head = [name for name in tuned if KEPT_BY_PEFT & set(name.split("."))]
    if in_head and len(in_head) < len(tuned):
        short = in_head[0].removeprefix("base_model.model.")
        got = f"they match {len(tuned) - len(in_head)} layers of the encoder and {short} of the head, which is trained whole"
        raise UserError(Problem("adapter.target_modules", got, do=f"say the encoder's with its path, such as {_regex(tuned, in_head)}"))
    for name, layer in tuned.items():
        sizes = [getattr(layer, size, None) for size in ("in_features", "out_features")]
        smallest = min((size for size in sizes if isinstance(size, int)), default=None)
        if rank is not None and smallest is not None and rank > smallest:
            short = name.removeprefix("base_model.model.")
            got = f"{rank} is more than the {smallest} rows or columns of {short}"
            raise UserError(Problem("adapter.r", got, f"at most {smallest}", "or other target_modules"))


def _regex(tuned: Any, in_head: list[str]) -> str:
    example = next(name for name in tuned if name not in in_head).removeprefix("base_model.model.").split(".")
    return f"'{example[0]}[.].*[.]{example[-1]}'"
