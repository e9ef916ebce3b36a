"""The survey of how sensitive each transformer layer is: the diagonal Fisher information of the base, summed over a layer.

    F_l,k = mean over client k's examples of sum_{theta in layer l} ||grad_theta loss||^2

Base weights get gradients one tensor at a time: each is squared and dropped as soon as backward has made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.layers import layer_of
from fedpeft.data.encoded import Encoded
from fedpeft.records import Arrays, Layout, TensorSpec
from fedpeft.sections import TrainingSection

if TYPE_CHECKING:
    import torch

Layers = list[tuple[str, int]]


@dataclass(frozen=True)
class LayerScores:
    """n_k F_l,k of every layer and n_k, which add up over clients; then the `share` with the highest scores."""

    asks: ClassVar[bool] = True

    examples: int  # of each client
    of_batches: bool  # square the gradient of a batch's mean loss, not of each example's
    share: float
    name: str  # of the global tensor [2, layers] that holds scores and choice
    layers: Callable[[Layout], Layers]

    def expects(self, layout: Layout) -> dict[str, TensorSpec]:
        """What a client's answer looks like."""
        return {"scores": TensorSpec((len(self.layers(layout)),), "float64"), "examples": TensorSpec((1,), "float64")}

    def measure(self, adapted: Adapted, task: Any, data: Encoded, training: TrainingSection) -> Arrays:
        """One client's scores, on examples evenly spaced over its data; dropout is off."""
        rows = np.linspace(0, len(data) - 1, min(self.examples, len(data))).astype(np.int64)
        size = training.per_device_train_batch_size if self.of_batches else 1
        parts = np.split(rows, range(size, len(rows), size))
        layers = self.layers(adapted.layout())
        adapted.unread.ready(data)
        adapted.model.eval()
        with _squares(adapted, layers) as squares:
            for part in parts:
                inputs, labels = data.batch(part, adapted.base.tokenizer, adapted.base.device)
                task.losses(adapted.model, inputs, labels).mean().backward()
        return {"scores": len(data) * squares / len(parts), "examples": np.array([float(len(data))])}

    def finish(self, total: Arrays, layout: Layout) -> Arrays:
        """Scores and choice; at least one layer, the lower one on a tie."""
        scores = total["scores"] / total["examples"][0]
        chosen = np.zeros(len(scores))
        chosen[np.argsort(-scores, kind="stable")[: max(1, int(self.share * len(scores)))]] = 1.0
        return {self.name: np.stack([scores, chosen]).astype(np.float32)}


@contextmanager
def _squares(adapted: Adapted, layers: Layers) -> Iterator[np.ndarray[Any, Any]]:
    """An array that gathers ||grad||^2 of each layer's base weights over the backward passes inside the block."""
    place = {layer: index for index, layer in enumerate(layers)}
    own = {id(parameter) for parameter in adapted.parameters.values()}
    squares = np.zeros(len(layers))
    adapted.train_only([])
    scored = [
        (place[layer], parameter)
        for name, parameter in adapted.model.named_parameters()
        if (layer := layer_of(name)) in place and id(parameter) not in own and parameter.is_floating_point()
    ]
    hooks = []
    for index, parameter in scored:
        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(_into(squares, index)))
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()
        for _, parameter in scored:
            parameter.requires_grad_(False)
            parameter.grad = None


def _into(squares: np.ndarray[Any, Any], index: int) -> Callable[[torch.Tensor], None]:
    def take(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        squares[index] += float(parameter.grad.float().square().sum())
        parameter.grad = None

    return take
