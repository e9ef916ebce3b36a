"""The gradient of the loss with respect to whole target matrices, of which only one stands on the device at a time.

A hook on the output y = W x + ... of each adapted layer sees dL/dy in the backward pass, and dL/dW = (dL/dy)^T x is formed
there, layer by layer, and added up in host memory. No base weight requires a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Indices
from fedpeft.records import Arrays


def full_gradients(
    adapted: Adapted, task: Any, arrays: Arrays, data: Encoded, batches: Sequence[Indices]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(module, dL/dW [d_out, d_in]) of every LoRA layer at `arrays` with B = 0; L is the mean over all examples, dropout is off."""
    import torch

    layout = adapted.layout()
    adapted.unread.ready(data)
    adapted.write({**arrays, **{pair.B: np.zeros_like(arrays[pair.B]) for pair in layout.pairs}})
    adapted.train_only([name for pair in layout.pairs for name in (pair.A, pair.B)])
    modules = dict(adapted.model.named_modules())
    sums: dict[str, torch.Tensor] = {}
    examples = sum(map(len, batches))

    def watch(module: str) -> Any:
        def forward(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()

            def backward(gradient: torch.Tensor) -> None:
                found = (gradient.reshape(-1, gradient.shape[-1]).float().T @ x).to("cpu")  # [d_out, d_in]
                sums[module] = sums[module] + found if module in sums else found

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    hooks = [modules[pair.module].register_forward_hook(watch(pair.module)) for pair in layout.pairs]
    adapted.model.eval()
    try:
        for rows in batches:
            inputs, labels = data.batch(rows, adapted.base.tokenizer, adapted.base.device)
            share = len(rows) * len(batches) / examples  # 1 where batches are alike
            (task.losses(adapted.model, inputs, labels).mean() * share).backward()
            adapted.model.zero_grad()
    finally:
        for hook in hooks:
            hook.remove()
    for pair in layout.pairs:
        yield pair.module, (sums.pop(pair.module) / len(batches)).numpy()
