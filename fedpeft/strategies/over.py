"""`Over`: a strategy that changes one thing of another, named by its key `over`, and leaves the rest to it.

A pair that means nothing is refused when the config is read, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedpeft.errors import UserError
from fedpeft.lookup import find
from fedpeft.records import Arrays, Layout, Update
from fedpeft.strategies.strategy import Combined, Round, Strategy, Turn


class Over(Strategy):
    """Everything is the inner strategy's unless a subclass says otherwise."""

    over: str = Field("fedavg", description="the strategy underneath, with its own defaults")

    @cached_property
    def inner(self) -> Strategy:
        """The strategy underneath."""
        inner: Strategy = find("strategy", self.over, "strategy.over")()
        return inner

    def refuses(self, inner: Strategy) -> str | None:
        """Why this means nothing over `inner`; None when it does."""
        return None

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        try:
            reason = "it is itself laid over another" if isinstance(self.inner, Over) else self.refuses(self.inner)
        except UserError as error:
            raise PydanticCustomError("over", "{said}", {"said": str(error)}) from error
        if reason:
            said = f"{type(self).__name__} means nothing over {self.over}: {reason}"
            raise PydanticCustomError("over", "{said}", {"said": said})
        return self

    @property
    def fewest(self) -> int:
        """As the inner strategy."""
        return self.inner.fewest

    def check(self, layout: Layout) -> None:
        """As the inner strategy."""
        self.inner.check(layout)

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """As the inner strategy."""
        return self.inner.sends(names, at)

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """As the inner strategy."""
        return self.inner.trains(names, at)

    def proximal(self, at: Round) -> float:
        """As the inner strategy."""
        return self.inner.proximal(at)

    def begin(self, turn: Turn) -> Arrays:
        """As the inner strategy."""
        return self.inner.begin(turn)

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """As the inner strategy."""
        return self.inner.end(turn, start, trained)

    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """As the inner strategy."""
        return self.inner.combine(updates, received, at)
