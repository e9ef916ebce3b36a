"""Where LoRA's factors start: s B0 A0 is taken out of the base, so that nothing changes at first.

    y = (W0 - s B0 A0) x + s B A x,   W0 [d_out, d_in],   W0 = U S V^T or Q R,   G = dL/dW summed over the clients' examples

    kaiming   A0 uniform, B0 = 0
    pissa     B0 = U_r (S_r / s)^(1/2),   A0 = (S_r / s)^(1/2) V_r^T
    olora     B0 = Q_r,   A0 = R_r
    lora_ga   B0 = c U_{r+1..2r}(G),   A0 = c V_{1..r}(G)^T,   c = d_out^(1/4) / gamma^(1/2)

-s B0 A0 is a merge of round 0 into the backbone (adapters/backbone.py): the server computes it, every client is sent it once,
the base's weights stay as they are on disk, and the exported adapter is one plain LoRA of rank 2 r. A decomposition that
turns out otherwise on another machine therefore does no harm.

Papers: Meng, Wang and Zhang 2024 (arXiv:2404.02948) for PiSSA; Büyükakyüz 2024 (arXiv:2406.01775) for OLoRA; Wang, Yu and Li
2024 (arXiv:2407.05000), section 3.3, for LoRA-GA. PEFT's LoRA-GA differs: it scales B by the singular values too, and A not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.errors import Problem, UserError
from fedpeft.lookup import Settings
from fedpeft.products import Matrix, leading
from fedpeft.records import Arrays, Layout, Pair, TensorSpec, merge_names
from fedpeft.sections import TrainingSection


class Init(Settings):
    """A as PEFT draws it, Kaiming-uniform, and B zero."""

    shifts: ClassVar[bool] = False  # something is taken out of the base

    def factors(self, W: Matrix, r: int, s: float) -> tuple[Matrix, Matrix] | None:
        """(B0, A0) from the weight; None: as drawn."""
        return None

    def survey(self) -> Any:
        """What the clients are asked, if the start depends on their data."""
        return None

    def prepare(self, adapted: Adapted) -> None:
        """Write the factors into a model that is as drawn."""
        for pair in adapted.layout().pairs:
            found = self.factors(adapted.weight(pair.module), pair.r, pair.s)
            if found is not None:
                adapted.merges |= shifted(pair, *found)
                adapted.write({name: array for name, array in shifted(pair, *found).items() if name in adapted.parameters} | adapted.merges)


def shifted(pair: Pair, B: Matrix, A: Matrix) -> Arrays:
    """The factors of a pair, and the merge of round 0 that takes their product out of the base."""
    left, right = merge_names(0, pair.module)
    arrays = {pair.B: B, pair.A: A, left: -pair.s * B, right: A}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


class Pissa(Init):
    """The first singular triples of the weight train, the rest is frozen."""

    shifts: ClassVar[bool] = True

    def factors(self, W: Matrix, r: int, s: float) -> tuple[Matrix, Matrix]:
        """B0 = U_r (S_r / s)^(1/2), A0 = (S_r / s)^(1/2) V_r^T."""
        U, S, Vt = leading(W, r)
        root = np.sqrt(S / s)
        return U * root, root[:, None] * Vt


class Olora(Init):
    """The first columns of the weight's orthonormal basis."""

    shifts: ClassVar[bool] = True

    def factors(self, W: Matrix, r: int, s: float) -> tuple[Matrix, Matrix]:
        """B0 = Q_r, A0 = R_r."""
        Q, R = np.linalg.qr(W)
        return Q[:, :r], R[:r]


class LoraGa(Init):
    """The first step moves W along the singular directions of the full gradient, which the clients are asked for."""

    shifts: ClassVar[bool] = True

    def survey(self) -> Any:
        """The full gradients."""
        return FullGradients()

    def prepare(self, adapted: Adapted) -> None:
        """As drawn until the survey. Raises UserError where a gradient has fewer than 2 r directions."""
        for pair in adapted.layout().pairs:
            if 2 * pair.r > (smallest := min(adapted.weight(pair.module).shape)):
                got = f"lora_ga takes 2 r = {2 * pair.r} singular directions, and {pair.module} has {smallest}"
                raise UserError(Problem("adapter.r", got, f"at most {smallest // 2}"))


class FullGradients(Settings):
    """G_k = sum over a client's first examples of dL/dW of every adapted matrix, with B = 0; the clients' sums add up exactly.

    They travel as they are, [d_out, d_in] floats a matrix, once.
    """

    asks: ClassVar[bool] = True
    batches: ClassVar[int] = 8  # of the training's size, of each client: 128 examples by default, as in the paper's code
    gamma: ClassVar[float] = 16.0

    def expects(self, layout: Layout) -> dict[str, TensorSpec]:
        """A gradient for every pair."""
        shapes = {pair.module: (layout.tensors[pair.B].shape[0], layout.tensors[pair.A].shape[1]) for pair in layout.pairs}
        return {module: TensorSpec(shape, "float32") for module, shape in shapes.items()}

    def measure(self, adapted: Adapted, task: Any, data: Encoded, training: TrainingSection) -> Arrays:
        """One client's sums."""
        from fedpeft.training.gradients import full_gradients

        size = training.per_device_train_batch_size
        rows = np.arange(min(len(data), size * self.batches))
        batches = np.split(rows, range(size, len(rows), size))
        return dict(_weighted(full_gradients(adapted, task, adapted.read(), data, batches), len(rows)))

    def finish(self, total: Arrays, layout: Layout) -> Arrays:
        """The factors of every pair, and what they take out of the base."""
        found: Arrays = {}
        for pair in layout.pairs:
            U, _, Vt = leading(total[pair.module], 2 * pair.r)
            c = len(U) ** 0.25 / self.gamma**0.5
            found |= shifted(pair, c * U[:, pair.r :], c * Vt[: pair.r])
        return found


def _weighted(gradients: Iterator[tuple[str, NDArray[np.float32]]], examples: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    return ((module, examples * gradient) for module, gradient in gradients)
