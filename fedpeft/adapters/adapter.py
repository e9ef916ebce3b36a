"""`Adapter`: a PEFT method and what a federation must know of it; `attach` puts it on a base."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings

if TYPE_CHECKING:
    from fedpeft.base import Base


class Adapter(Settings):
    """Settings of one adapter family. PEFT does the work; a subclass says which of its configs."""

    has_factors: ClassVar[bool] = True  # its update is s B A, or s B R A
    has_cores: ClassVar[bool] = False  # ... with a trained R between frozen factors

    @abstractmethod
    def peft_config(self, peft_task: str, also_saved: Sequence[str]) -> Any:
        """The `peft.PeftConfig` of these settings for a PEFT task such as "SEQ_CLS"; `also_saved` modules are trained whole."""

    @property
    def mixed_ranks(self) -> bool:
        """Clients may have different ranks."""
        return False

    def ranks(self, names: Sequence[str], seed: int) -> dict[int, int]:
        """Client -> its rank, where that may differ from the global adapter's. Raises UserError for a client that is not there."""
        return {}

    def survey(self) -> Any:
        """What has to be asked of the clients before round 1 (an object as in training/surveys.py); None: nothing."""
        return None

    def complete(self, model: Any) -> None:
        """What PEFT's model needs besides, drawn from torch's generator; nothing by default."""

    def check(self, skeleton: Any, peft_task: str) -> None:
        """Attach to a model without weights. Raises UserError when PEFT refuses, with its reason and the layers there are."""
        import torch
        from peft import get_peft_model
        from transformers.pytorch_utils import Conv1D

        modules = [name for name, module in skeleton.base_model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
        try:
            get_peft_model(skeleton, self.peft_config(peft_task, ()))
        except (ValueError, TypeError, KeyError, re.error) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(Problem("adapter", f"PEFT cannot attach it ({reason})", f"target_modules among {layers}")) from error

    def attach(self, base: Base, peft_task: str, seed: int, train_head: bool) -> Adapted:
        """A PEFT model around the base, its new tensors drawn from `seed` and kept in float32."""
        from peft import get_peft_model

        with seeds.torch_seed(seeds.derive(seed, "adapter"), base.device):
            model = get_peft_model(base.model, self.peft_config(peft_task, base.fresh), autocast_adapter_dtype=True)
            self.complete(model)
        return Adapted(base, model, train_head)
