"""LoRA and rank-stabilised LoRA, through PEFT; DoRA and block-diagonal LoRA, which are LoRA and something more.

    LoRA    y = W0 x + s B A x      W0 [d_out, d_in] frozen, A [r, d_in] Kaiming-uniform, B [d_out, r] zero
            s = alpha / r, or alpha / sqrt(r) with rsLoRA
    DoRA    W = m (W0 + s B A) / ||W0 + s B A||      a norm and a trained magnitude m a row, m = ||W0|| at first
    BD-LoRA B or A is block-diagonal with N blocks, so that the update shards over N devices

Averaging A and B is not averaging B A. On convolutions A [r, d_in, k, k] and B [d_out, r, 1, 1]; then strategies that
work on matrices are refused.

Papers: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732) for rsLoRA; Liu et al. 2024
(arXiv:2402.09353) for DoRA; Wang et al. 2025 (arXiv:2510.23346) for BD-LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapter import Adapter
from fedpeft.adapters.inits import Init
from fedpeft.adapters.ranks import Ranks, deal, highest
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import find
from fedpeft.records import Layout, Pair
from fedpeft.strategies.strategy import Round

if TYPE_CHECKING:
    from fedpeft.base import Base

TARGETS = 'names or a regular expression of the layers to adapt, or "all-linear"; null: PEFT\'s choice for the architecture'


ONE = Pair("layer", "A", "B", 1.0)  # to ask a strategy what it does with a pair


class LoraLike(Adapter):
    """What PEFT's LoraConfig carries, whatever the rank."""

    lora_alpha: float = Field(16, gt=0, description="the update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    use_rslora: bool = Field(False, description="rank-stabilised scaling")
    target_modules: list[str] | str | None = Field(None, description=TARGETS)

    def variant(self) -> Mapping[str, Any]:
        """What makes PEFT's LoraConfig this variant."""
        return {}

    def peft_config(self, peft_task: str | None, also_saved: Sequence[str]) -> Any:
        """PEFT's LoraConfig."""
        from peft import LoraConfig

        return LoraConfig(
            task_type=peft_task,
            r=self.rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            target_modules=self.target_modules,
            bias="none",
            modules_to_save=list(also_saved),
            **self.variant(),
        )


class Lora(LoraLike):
    """Low-rank adaptation: the update of each target matrix is s B A. Averaging A and B is not averaging B A."""

    factored: ClassVar[bool] = True

    r: Ranks = Field(
        8, description="rank of the update; a list, shares {rank: share}, or {clients: {name: rank}, rest: rank} give clients their own"
    )
    init: str = Field("kaiming", description="A and B before round 1: kaiming, pissa, olora or lora_ga")

    @model_validator(mode="after")
    def _an_init_that_fits(self) -> Lora:
        try:
            shifts = self.start.shifts
        except UserError as error:
            raise PydanticCustomError("init", "{said}", {"said": str(error)}) from error
        if shifts and self.mixed_ranks:
            raise PydanticCustomError("init", "{said}", {"said": f"init {self.init} needs one rank for all clients, or take init kaiming"})
        return self

    @cached_property
    def start(self) -> Init:
        """The initialisation."""
        made: Init = find("init", self.init, "adapter.init")()
        return made

    @property
    def decomposes(self) -> bool:  # type: ignore[override]
        """PiSSA and its kin look at the weights."""
        return self.start.shifts

    @property
    def rank(self) -> int:
        """The largest rank of a client."""
        return highest(self.r)

    @property
    def mixed_ranks(self) -> bool:
        """Clients may have different ranks."""
        return not isinstance(self.r, int)

    def ranks(self, names: Sequence[str], seed: int) -> dict[int, int]:
        """The rank of each client, where they may differ."""
        return dict(enumerate(deal(self.r, names, seed))) if self.mixed_ranks else {}

    def check_strategy(self, strategy: Any) -> None:
        """As every adapter; an initialisation needs factors that outlive a round."""
        super().check_strategy(strategy)
        if self.start.shifts and ONE.B not in strategy.sends((ONE.A, ONE.B), Round(1, 1, Layout({}, (ONE,)))):
            got = f"{type(strategy).__name__} starts the factors anew in every round, and init {self.init} is lost"
            raise UserError(Problem("adapter.init", got, "kaiming", "or another strategy"))

    def survey(self) -> Any:
        """The full gradient, for the initialisation that starts from it."""
        return self.start.survey()

    def attach(self, base: Base, peft_task: str | None, seed: int, train_head: bool) -> Adapted:
        """As every adapter, then the initialisation of the factors."""
        adapted = super().attach(base, peft_task, seed, train_head)
        self.start.prepare(adapted)
        return adapted


class Dora(LoraLike):
    """Weight-decomposed LoRA: direction W0 + s B A and magnitude m of each row train apart. Averages approximately."""

    r: int = Field(8, ge=1, description="rank of the update of the direction")

    @property
    def rank(self) -> int:
        """Rank of the direction's update."""
        return self.r

    def variant(self) -> Mapping[str, Any]:
        """DoRA."""
        return {"use_dora": True}


class BdLora(LoraLike):
    """Block-diagonal LoRA: one factor in blocks, for serving over several devices without gathering. Averages approximately."""

    r: int = Field(8, ge=1, description="rank of the update, a multiple of nblocks")
    nblocks: int = Field(2, ge=1, description="blocks: the devices that will serve the adapter")
    target_modules_bd_a: list[str] = Field([], description="names, or parts of names, of targets with A in blocks (row-parallel layers)")
    target_modules_bd_b: list[str] | None = Field(
        None,
        description="names, or parts of names, of targets with B in blocks (column-parallel layers); null: all that are not named above",
    )

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.r

    def variant(self) -> Mapping[str, Any]:
        """BD-LoRA. A part of a name that is in every name stands for all."""
        from peft.tuners.lora.config import BdLoraConfig

        blocks_of_B = [""] if self.target_modules_bd_b is None else self.target_modules_bd_b
        return {"use_bdlora": BdLoraConfig(self.target_modules_bd_a or None, blocks_of_B, self.nblocks)}
