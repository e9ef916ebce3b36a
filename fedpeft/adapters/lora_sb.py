"""LoRA-SB: frozen A and B, and a trained core R between them, which stands for a whole update in the space of rank r.

    y = W0 x + B R A x      B [d_out, r], A [r, d_in] with orthonormal columns and rows, R [r, r]
    gradient start          D = -eta sign(sum_i dL_i/dW) = U S V^T,   B = U_r,   R = S_r,   A = V_r^T
    orthonormal start       B and A drawn from the seed,   R = 0

The first is the step that Adam would take first, of full rank, cut to rank r; it stays in the update. Its sum over all
clients' examples is a dense matrix a target, sent once: count it as a data-dependent step. The second asks for nothing.
alpha does not exist: s = 1. Since A and B are fixed and shared, the mean of cores is the mean of updates.

Papers: Ponkshe et al. 2024 (arXiv:2411.19557), equations 7 to 9; Singhal et al. 2025 (arXiv:2502.15436) for federations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.adapter import Adapter
from fedpeft.adapters.lora import TARGETS
from fedpeft.adapters.rank_space import add_cores
from fedpeft.data.encoded import Encoded
from fedpeft.lookup import Settings
from fedpeft.products import leading
from fedpeft.records import Arrays, Layout, TensorSpec
from fedpeft.sections import TrainingSection
from fedpeft.training.gradients import full_gradients


class LoraSb(Adapter):
    """Trains r x r numbers a matrix, exactly averaged; use a large r."""

    has_cores: ClassVar[bool] = True

    r: int = Field(32, ge=1, description="rank of the space that the core works in")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: list[str] | str | None = Field(None, description=TARGETS)
    start: Literal["gradient", "orthonormal"] = Field(
        "gradient", description="A and B from the clients' gradients, summed once before round 1, or drawn from the seed"
    )
    first_step: float = Field(1e-4, gt=0, description="eta, how far the gradient start moves each entry of a weight before it is cut")
    gradient_batches: int = Field(8, ge=1, description="batches of each client that the gradient start looks at")

    @property
    def rank(self) -> int:
        """Rank of the space."""
        return self.r

    def peft_config(self, peft_task: str | None, also_saved: Sequence[str]) -> Any:
        """PEFT's LoraConfig with s = 1."""
        from peft import LoraConfig

        return LoraConfig(
            task_type=peft_task,
            bias="none",
            modules_to_save=list(also_saved),
            r=self.r,
            lora_alpha=self.r,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
        )

    def complete(self, model: Any) -> None:
        """Cores, and orthonormal A and B."""
        import torch

        add_cores(model)
        for name, parameter in model.named_parameters():
            if name.endswith(".weight") and ("lora_A" in name or "lora_B" in name):
                torch.nn.init.orthogonal_(parameter)

    def survey(self) -> Any:
        """The sum of gradients, for the gradient start."""
        return GradientStart(first_step=self.first_step, batches=self.gradient_batches) if self.start == "gradient" else None


class GradientStart(Settings):
    """A, B and R from the sign of the clients' summed gradients."""

    asks: ClassVar[bool] = True
    first_step: float
    batches: int

    def expects(self, layout: Layout) -> dict[str, TensorSpec]:
        """A gradient [d_out, d_in] a matrix."""
        shapes = {pair.module: (layout.tensors[pair.B].shape[0], layout.tensors[pair.A].shape[1]) for pair in layout.pairs}
        return {module: TensorSpec(shape, "float32") for module, shape in shapes.items()}

    def measure(self, adapted: Adapted, task: Any, data: Encoded, training: TrainingSection) -> Arrays:
        """One client's sum over its first examples of dL_i/dW; of more than a batch, whole batches only."""
        size = min(len(data), training.per_device_train_batch_size)
        rows = np.split(np.arange(len(data) // size * size), len(data) // size)[: self.batches]
        return {module: size * len(rows) * mean for module, mean in full_gradients(adapted, task, adapted.read(), data, rows)}

    def finish(self, total: Arrays, layout: Layout) -> Arrays:
        """B = U_r, A = V_r^T and R = S_r of -eta sign(total)."""
        found: Arrays = {}
        for pair in layout.pairs:
            assert pair.core is not None
            U, S, Vt = leading(-self.first_step * np.sign(total[pair.module]), layout.tensors[pair.A].shape[0])
            found |= {name: part.astype(np.float32) for name, part in ((pair.B, U), (pair.core, np.diag(S)), (pair.A, Vt))}
        return found
