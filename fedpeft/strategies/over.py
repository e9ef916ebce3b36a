"""`Over`: a strategy that changes one thing of another, named by its key `over`, and leaves the rest to it.

A pair that means nothing is refused when the config is read, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedpeft.errors import UserError
from fedpeft.lookup import find
from fedpeft.records import Arrays, Layout, TensorSpec, Update
from fedpeft.strategies.strategy import Combined, Round, Strategy, Turn, streaming


class Over(Strategy):
    """Everything is the inner strategy's unless a subclass says otherwise."""

    exact: ClassVar[bool] = True  # as exact as what is underneath
    summable: ClassVar[bool] = True  # needs no more than what is underneath

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
    def noise_proof(self) -> bool:  # type: ignore[override]
        """As the inner strategy, and so the five that follow."""
        return self.inner.noise_proof

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """Part of the update goes into the backbone."""
        return self.inner.merges

    @property
    def personal(self) -> bool:  # type: ignore[override]
        """Part of each client's model stays with it."""
        return self.inner.personal

    @property
    def stateful(self) -> bool:  # type: ignore[override]
        """Clients remember something."""
        return self.inner.stateful

    @property
    def of_factors(self) -> bool:  # type: ignore[override]
        """It means nothing without factors."""
        return self.inner.of_factors

    @property
    def mixed_ranks(self) -> bool:  # type: ignore[override]
        """Clients may have different ranks."""
        return self.inner.mixed_ranks

    @property
    def streams(self) -> bool:
        """As the inner strategy, unless a subclass needs more."""
        return super().streams and self.inner.streams

    @property
    def fewest(self) -> int:
        """As the inner strategy."""
        return self.inner.fewest

    @property
    def of_mean(self) -> bool:
        """As the inner strategy, where this one adds nothing that needs more."""
        return self.from_mean and self.inner.of_mean

    def check_config(self, config: Any, adapter: Any) -> None:
        """As the inner strategy."""
        self.inner.check_config(config, adapter)

    def check(self, layout: Layout) -> None:
        """As the inner strategy."""
        self.inner.check(layout)

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """As the inner strategy."""
        return self.inner.sends(names, at)

    def fit(self, arrays: Arrays, layout: Layout, own: Layout) -> tuple[Arrays, float]:
        """As the inner strategy."""
        return self.inner.fit(arrays, layout, own)

    def sparse(self, layout: Layout, seed: int) -> Mapping[str, NDArray[np.int64]]:
        """As the inner strategy."""
        return self.inner.sparse(layout, seed)

    def extras(self, arrays: Arrays) -> Arrays:
        """As the inner strategy."""
        return self.inner.extras(arrays)

    def start(self, arrays: Arrays) -> Arrays:
        """As the inner strategy."""
        return self.inner.start(arrays)

    def trains(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """As the inner strategy."""
        return self.inner.trains(names, at)

    def uploads(self, names: Sequence[str], at: Round) -> dict[str, TensorSpec]:
        """As the inner strategy."""
        return self.inner.uploads(names, at)

    def proximal(self, at: Round) -> float:
        """As the inner strategy."""
        return self.inner.proximal(at)

    def own(self, turn: Turn) -> Arrays:
        """As the inner strategy."""
        return self.inner.own(turn)

    def tail(self, at: Round) -> tuple[float, float]:
        """As the inner strategy."""
        return self.inner.tail(at)

    def begin(self, turn: Turn) -> Arrays:
        """As the inner strategy."""
        return self.inner.begin(turn)

    def drift(self, turn: Turn) -> Arrays:
        """As the inner strategy."""
        return self.inner.drift(turn)

    def end(self, turn: Turn, start: Arrays, trained: Arrays) -> tuple[Arrays, Arrays]:
        """As the inner strategy."""
        return self.inner.end(turn, start, trained)

    def answer(self, turn: Turn, asked: Arrays) -> Arrays:
        """As the inner strategy."""
        return self.inner.answer(turn, asked)

    def second(self, updates: Sequence[Update], at: Round) -> Arrays:
        """As the inner strategy."""
        return self.inner.second(updates, at)

    def answers(self, at: Round) -> dict[str, TensorSpec]:
        """As the inner strategy."""
        return self.inner.answers(at)

    @streaming
    def combine(self, updates: Sequence[Update], received: Arrays, at: Round) -> Combined:
        """As the inner strategy."""
        return self.inner.combine(updates, received, at)
