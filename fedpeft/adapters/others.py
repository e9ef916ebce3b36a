"""PEFT types without a file of their own: `adapter: {name: loha, options: {r: 4}}` passes PEFT its own settings."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fedpeft.adapters.federable import FEDERABLE, How
from fedpeft.adapters.plain import Plain
from fedpeft.errors import Problem, UserError, nearest
from fedpeft.lookup import TABLES


class Other(Plain):
    """A PEFT type by its own settings."""

    options: dict[str, Any] = Field({}, description="the settings of PEFT's config of this type, under PEFT's names")

    def peft_settings(self) -> dict[str, Any]:
        """PEFT's settings as given."""
        targets = {} if self.target_modules is None else {"target_modules": self.target_modules}
        return {**targets, **self.options}


def other(name: str) -> type[Other]:
    """The adapter called `name` in federable.py, where it has no file. Raises UserError when it is refused, or is none."""
    facts = FEDERABLE.get(name)
    if facts is None:
        known = sorted({*TABLES["adapter"], *(name for name, facts in FEDERABLE.items() if facts.how is not How.REFUSED)})
        raise UserError(Problem("adapter.name", f'no adapter is called "{name}"', ", ".join(known), nearest(name, known)))
    if facts.how is How.REFUSED:
        raise UserError(Problem("adapter.name", f'"{name}" cannot be federated: {facts.says}', do=facts.instead))

    peft = facts.peft

    class Named(Other):
        peft_type: ClassVar[str] = peft

    Named.__name__ = Named.__qualname__ = name
    return Named
