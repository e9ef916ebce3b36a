"""`Adapter`: a PEFT method and what a federation must know of it; `attach` puts it on a base.

Who asks it what, in the order of a run:

    simulations/assemble.py   check(skeleton)            refusals before any weight is loaded
    simulations/assemble.py   attach(base)               the PEFT model, its new tensors drawn from the seed
    server/rounds.py          survey()                   sums asked of the clients before round 1
    server, client            resting(arrays)            tensors that neither train nor travel
    client/worker.py          rules(start)               how single tensors are trained
    server/rounds.py          settle(arrays)             the average, brought back to where the method lives
    server/ending.py          export(folder)             what stock PEFT needs besides

What federates how, of every method, stands in federable.py.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedpeft import seeds
from fedpeft.adapters import frozen
from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.matching import check_head, check_rank
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings
from fedpeft.records import Arrays, Layout
from fedpeft.training.rules import Rules

if TYPE_CHECKING:
    from fedpeft.base import Base

WANTS_FLOATS = "its bases are decomposed from the weights, and these are quantised"


class Adapter(Settings):
    """Settings of one adapter family. PEFT does the work; a subclass says which of its configs."""

    factored: ClassVar[bool] = False  # the update of every matrix is s B A: strategies may work on the factors
    has_cores: ClassVar[bool] = False  # it is s B R A, with a trained R between frozen factors
    decomposes: ClassVar[bool] = False  # it computes with the values of the base's weights, which must not be quantised

    @abstractmethod
    def peft_config(self, peft_task: str | None, also_saved: Sequence[str]) -> Any:
        """The `peft.PeftConfig` of these settings for a PEFT task such as "SEQ_CLS"; `also_saved` modules are trained whole."""

    @property
    def mixed_ranks(self) -> bool:
        """Clients may have different ranks."""
        return False

    @property
    def rank(self) -> int | None:
        """The largest rank of an update; None where that means nothing."""
        return None

    def ranks(self, names: Sequence[str], seed: int) -> dict[int, int]:
        """Client -> its rank, where that may differ from the global adapter's. Raises UserError for a client that is not there."""
        return {}

    def survey(self) -> Any:
        """What has to be asked of the clients before round 1 (an object as in training/surveys.py); None: nothing."""
        return None

    def complete(self, model: Any) -> None:
        """What PEFT's model needs besides, drawn from torch's generator; nothing by default."""

    def resting(self, layout: Layout, arrays: Arrays) -> frozenset[str]:
        """Tensors that stay as every client drew them under the global `arrays`: they neither train nor travel."""
        return frozenset()

    @property
    def plain_steps(self) -> bool:
        """Every tensor moves by the run's optimiser, at the run's rate."""
        return True

    def rules(self, layout: Layout, start: Arrays) -> Rules:
        """How single tensors are trained in a turn that begins at `start`."""
        return Rules()

    def settle(self, arrays: Arrays, layout: Layout) -> Arrays:
        """The global arrays after a round, where averaging has left the set on which the method is defined."""
        return arrays

    def report(self, layout: Layout, arrays: Arrays) -> dict[str, Any]:
        """What the method chose by itself, for summary.json."""
        return {}

    def export(self, folder: pathlib.Path, adapted: Adapted) -> None:
        """Change the PEFT folder just written so that stock PEFT gives this model; nothing, by default."""
        return None

    def check_strategy(self, strategy: Any) -> None:
        """Raises UserError when the adapter means nothing with a `Strategy`; loads nothing."""
        if strategy.of_factors and not self.factored:
            got = f"{type(strategy).__name__} works on LoRA factors, and {type(self).__name__} has none or more than these"
            raise UserError(Problem("strategy.name", got, do="use strategy fedavg, or adapter lora"))

    def check(self, skeleton: Any, peft_task: str | None) -> None:
        """Attach to a model without weights. Raises UserError when PEFT refuses, with its reason and the layers there are."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        if self.decomposes and getattr(skeleton.config, "quantization_config", None) is not None:
            raise UserError(Problem("adapter.name", WANTS_FLOATS, do="use adapter lora, or the unquantised model in bfloat16"))
        linear = [name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
        head = [name for name in linear if not name.startswith(f"{skeleton.base_model_prefix}.")]
        modules = sorted(set(linear) - set(head))
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
        try:
            try:
                config = self.peft_config(peft_task, ())
                check_head(config, head)
                model = get_peft_model(skeleton, config)
            except NotImplementedError:
                # Nothing of ours is unfinished: torch raises it for a read of values on the meta device. This type (FRoD, say)
                # computes with the values of weights, and a skeleton has none. What is checked here is which layers match, and
                # LoRA matches the same; what hangs on values is checked by `attach`, on the real weights.
                targets = getattr(self, "target_modules", None)
                model = get_peft_model(skeleton, LoraConfig(r=1, target_modules=targets, task_type=peft_task))
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, re.error) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(Problem("adapter", f"PEFT cannot attach it ({reason})", f"target_modules among {layers}")) from error
        check_rank(model, self.rank, head)

    def attach(self, base: Base, peft_task: str | None, seed: int, train_head: bool) -> Adapted:
        """A PEFT model around the base, its new tensors drawn from `seed` and kept in float32.

        The fingerprint of the base takes in the adapter's frozen bases: who has other ones is told so.
        """
        from peft import get_peft_model

        with seeds.torch_seed(seeds.derive(seed, "adapter"), base.device):
            try:
                model = get_peft_model(base.model, self.peft_config(peft_task, base.fresh), autocast_adapter_dtype=True)
            except (ValueError, NotImplementedError, TypeError) as error:
                # PEFT's three ways to say that a type has no form for a quantised layer, which a skeleton does not show: said in a
                # line of ours. On any other base these mean something else, and go on as they are.
                if getattr(base.model.config, "quantization_config", None) is None:
                    raise
                got = f"PEFT cannot attach it to a quantised base ({str(error).splitlines()[0]})"
                raise UserError(Problem("adapter.name", got, "lora", "or set model.quantization to null")) from error
            self.complete(model)
        adapted = Adapted(base, model, self, train_head)
        if bases := frozen.digest(model, tuple(adapted.parameters.values())):
            adapted.base = dataclasses.replace(base, fingerprint=frozen.joined(base.fingerprint, bases))
        return adapted
