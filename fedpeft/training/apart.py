"""Whether the records of a batch stay apart: no layer sees of a record anything else beside others than alone.

    x_l(i, j)[i] = x_l(i)    for the input x_l of every layer l that trains, and for the outputs, j longer than i

Clients that share a pass need it, and so does the gradient of a single example, without which clipping bounds nothing. It does not
hold where rows are mixed (a norm over the batch), where padding is read (FNet's transform over time), or where time comes first.
Where a layer sees all tokens of a batch in one row after another (OPT's feed-forward), records are apart but are not its rows.
A dropout of what all records share (DeBERTa's table of distances) has no mask that is one client's own.

It is found by trial, with two made-up records, without knowing the architecture, once a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.encoded import TOKENS, Encoded

if TYPE_CHECKING:
    import torch

    from fedpeft.adapters.adapted import Adapted

LONGEST = 9  # tokens of the longer record
DIFFERENT = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 5e-2}
"""By the base's dtype: the share of a layer's largest input by which a record may differ beside another, by rounding."""

Inputs = list[tuple[str, Any]]
"""(layer, its input), call by call, and the model's outputs at the end."""


def mixing(model: Any) -> str | None:
    """Why rows of a batch see each other whatever a trial shows, if they do."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            return f"{name} normalises over the rows of a batch"
        if hasattr(module, "expert_capacity"):
            return f"{name} routes the rows of a batch to experts of bounded capacity"
    return None


class Apart:
    """What is known of one model. `ready` looks once, and the model stays so."""

    def __init__(self, adapted: Adapted, ask: Callable[..., Any] | None = None) -> None:
        self.adapted = adapted
        self.by_row = False  # every layer that trains has one row a record: known, not supposed
        self.obstacle: str | None = None  # why records cannot share a batch
        self._ask = ask  # (model, inputs, labels) -> [batch, numbers]: a task's call of the model, such as its `outputs`

    def ready(self, data: Encoded) -> None:
        """Try it on records made like those of `data`, when first called."""
        import torch
        from torch.nn.modules.dropout import _DropoutNd

        ask, self._ask = self._ask, None
        if ask is None:
            return
        model, was = self.adapted.model, self.adapted.model.training
        pair = _made(data, self.adapted.base)
        ours = {id(parameter) for parameter in self.adapted.parameters.values()}
        layers = {name: module for name, module in model.named_modules() if any(id(p) in ours for p in module.parameters(recurse=False))}
        dropouts = {name: module for name, module in model.named_modules() if isinstance(module, _DropoutNd) and module.p > 0}

        def seen(by: dict[str, Any], rows: list[int]) -> Inputs:
            return _inputs(by, lambda: ask(model, *pair.batch(np.array(rows), self.adapted.base.tokenizer, self.adapted.base.device)))

        model.eval()
        try:
            with torch.no_grad():
                self._compare(seen(layers, [0, 1]), (seen(layers, [0]), seen(layers, [1])), (pair.length(0), pair.length(1)))
                dropped = seen(dropouts, [0, 1])
        finally:
            model.train(was)
        for name, x in dropped[:-1]:
            if len(x) not in (2, 2 * pair.length(1)):
                self.obstacle = self.obstacle or f"{name} drops out {tuple(x.shape)}, which is not one entry a record"

    def _compare(self, both: Inputs, alone: Sequence[Inputs], lengths: tuple[int, int]) -> None:
        share = DIFFERENT[str(self.adapted.base.model.dtype).removeprefix("torch.")]
        self.by_row = True
        for place, (name, together) in enumerate(both):
            rows = together
            if len(rows) != len(lengths) and rows.ndim == 2 and len(rows) == len(lengths) * max(lengths):
                self.by_row, rows = False, rows.reshape(len(lengths), max(lengths), -1)
            for row, (inputs, length) in enumerate(zip(alone, lengths, strict=True)):
                own = inputs[place][1] if place < len(inputs) else None
                if own is None or len(rows) != len(lengths):
                    self.obstacle = f"{name} sees {tuple(together.shape)} of two records, which is not one entry a record"
                elif not _same(rows[row], own, length, self.adapted.base.tokenizer, share):
                    self.obstacle = f"what {name} sees of a record depends on the others of its batch"
                if self.obstacle:
                    self.by_row = False
                    return


def _inputs(layers: dict[str, Any], call: Callable[[], Any]) -> Inputs:
    """What each of `layers` sees in a call of the model, and what comes out."""
    found: Inputs = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: found.append((name, args[0].detach())) if args else None)
        for name, module in layers.items()
    ]
    try:
        outputs = call()
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, ("its output", outputs)]


def _same(row: torch.Tensor, own: torch.Tensor, length: int, tokenizer: Any, share: float) -> bool:
    """A record's part of a batch is what it is alone, but for padding."""
    if own.numel() != row.numel():
        row = row[-length:] if tokenizer.padding_side == "left" else row[:length]
    if own.numel() != row.numel():
        return False
    row, own = row.reshape(-1).float(), own.reshape(-1).float()
    return bool((row - own).abs().max() <= share * own.abs().max())


def _made(data: Encoded, base: Any) -> Encoded:
    """A short and a long record that are like the first of `data` in all but their contents."""
    draw = np.random.default_rng(0)
    like = data.inputs[0]
    if TOKENS not in like:
        pictures = [{name: draw.standard_normal(value.shape).astype(value.dtype) for name, value in like.items()} for _ in range(2)]
        return Encoded(pictures, data.labels[[0, 0]], data.label_count, patches=data.patches)
    vocabulary, pad = base.model.config.get_text_config().vocab_size, getattr(base.tokenizer, "pad_token_id", None)
    longest = min(LONGEST, max(data.length(row) for row in range(len(data))))
    words = np.array([token for token in range(vocabulary // 2, vocabulary) if token != pad][:longest])
    counts = {"position_ids": np.arange(len(words)), "token_type_ids": np.zeros(len(words))}
    whole = {name: words if name == TOKENS else counts.get(name, np.ones(len(words))) for name in like}
    cuts = [(len(words) + 1) // 2, len(words)]
    inputs = [{name: value[:cut].astype(like[name].dtype) for name, value in whole.items()} for cut in cuts]
    labels = data.labels[[0, 0]]
    if labels.dtype == object:
        labels = np.empty(2, dtype=object)
        labels[:] = [row[TOKENS].astype(data.labels[0].dtype) for row in inputs]
    return Encoded(inputs, labels, data.label_count)
