"""The strategies, one file each, and `flower(name, **settings)`: any of them for somebody else's Flower app."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.strategies.flower_strategy import flower as flower

__all__ = ["flower"]


def __getattr__(name: str) -> Any:
    """Import `flower` when it is first used: the strategies themselves need no Flower."""
    if name != "flower":
        raise AttributeError(f"module 'fedpeft.strategies' has no attribute {name!r}")
    from fedpeft.strategies.flower_strategy import flower

    return flower
