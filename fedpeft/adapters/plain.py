"""`Plain`: an adapter whose settings are those of PEFT's own config, under PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from fedpeft.adapters.adapter import Adapter
from fedpeft.adapters.lora import TARGETS


class Plain(Adapter):
    """PEFT's config of one type, with these settings."""

    peft_type: ClassVar[str]  # PEFT's name of the type
    always: ClassVar[Mapping[str, Any]] = {}  # PEFT settings that a federation leaves no choice about

    target_modules: list[str] | str | None = Field(None, description=TARGETS)

    def peft_settings(self) -> dict[str, Any]:
        """What PEFT's config is told."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def peft_config(self, peft_task: str | None, also_saved: Sequence[str]) -> Any:
        """PEFT's config."""
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.peft_type)]
        return config(task_type=peft_task, modules_to_save=list(also_saved), **{**self.always, **self.peft_settings()})
