"""The loss of the next token, per record: the one place where a language model's logits become numbers.

    loss_i = sum over trained t of -log p(x_t | x_<t),   right_i = #{trained t: x_t is the likeliest}

Only positions that train reach the softmax. Where the output layer is frozen and nothing but a soft cap follows it, their
logits are made a few rows at a time (cross_entropy.py); else a batch costs V float32 numbers a trained token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fedpeft.data.encoded import UNTRAINED
from fedpeft.tasks.cross_entropy import chunked, hidden_states, output_layer

if TYPE_CHECKING:
    import torch


class Scores(NamedTuple):
    """Sums over the trained tokens of each record."""

    loss: torch.Tensor  # [batch], differentiable
    right: torch.Tensor  # [batch]
    tokens: torch.Tensor  # [batch]


def scores(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> Scores:
    """Of a causal model on `inputs` [batch, time] with `labels` [batch, time]; the token at t is said by the output at t - 1."""
    import torch
    from torch.nn import functional

    rows, places = torch.nonzero(labels[:, 1:] != UNTRAINED, as_tuple=True)
    wanted = labels[:, 1:][rows, places]  # [trained]
    if (layer := output_layer(model)) is not None:
        hidden = hidden_states(model, inputs)[:, :-1][rows, places]  # [trained, d]
        each, likeliest = chunked(hidden, layer, wanted)
    else:
        logits = model(**inputs).logits[:, :-1][rows, places].float()  # [trained, V]
        each, likeliest = functional.cross_entropy(logits, wanted, reduction="none"), logits.argmax(dim=1)
    right = (likeliest == wanted).to(each.dtype)
    none = each.new_zeros(len(labels))
    return Scores(none.index_add(0, rows, each), none.index_add(0, rows, right), none.index_add(0, rows, torch.ones_like(right)))
