"""Dropout of many clients in one pass, each from its own generator, as if it trained alone.

torch draws one mask for a whole tensor, so that a client's mask would depend on who shares its pass. Here every dropout of
the model, that inside the attention included, draws for each client's batch the mask that engine `one` draws: from a
generator seeded alike, in the order in which the model asks, in the shape of that batch alone (padded to its own longest
row). On a CPU the masks are those of `one` to the bit; a GPU's own generator deals its numbers out by position, so there
they are other masks of the same law, equal whoever shares the pass.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class UnsuitedError(Exception):
    """The model cannot train many clients in one pass; the message says why."""


@dataclass
class Masks:
    """The masks of one batch of one client, in the order of the model's questions; drawn when first asked for."""

    generator: torch.Generator
    rows: int
    time: int  # its longest row
    drawn: list[torch.Tensor] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # lanes may hold rows of the same batch

    def get(self, question: int, shape: Sequence[int], keep: float) -> torch.Tensor:
        """What is kept, of `shape`."""
        import torch

        with self._lock:
            if question == len(self.drawn):
                mask = torch.empty(tuple(shape), dtype=torch.bool, device=self.generator.device)
                self.drawn.append(mask.bernoulli_(keep, generator=self.generator))
            return self.drawn[question]


@dataclass(frozen=True)
class Span:
    """Rows start..stop of a pass are the `chosen` rows of a batch whose masks are these."""

    masks: Masks
    chosen: list[int]
    start: int

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + len(self.chosen)


class Dropouts:
    """Answers every dropout of one pass. Use `mode` around the model's call."""

    def __init__(self, spans: Sequence[Span], time: int) -> None:
        self.spans = spans
        self.rows = spans[-1].stop
        self.time = time
        self._questions = 0

    def mode(self) -> Any:
        """A context in which torch's dropouts are answered here."""
        import torch
        from torch.nn import functional
        from torch.overrides import TorchFunctionMode

        answers: dict[Any, Callable[..., torch.Tensor]] = {
            functional.dropout: self._dropout,
            torch.dropout: lambda input, p, train: self._dropout(input, p, train),
            functional.scaled_dot_product_attention: self._attention,
        }

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return answers.get(function, function)(*args, **(kwargs or {}))

        return Mode()

    def _dropout(self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return input * self._noise(input, p) if training and p > 0 else input

    def _noise(self, input: torch.Tensor, p: float) -> torch.Tensor:
        """0 or 1 / (1 - p), of the shape of `input`, which is [rows, ...] or [rows * time, ...]."""
        flat = len(input) != self.rows
        if flat and len(input) != self.rows * self.time:
            raise UnsuitedError(f"a dropout sees {tuple(input.shape)}, which is not one entry a row")
        shape = (self.rows, self.time, *input.shape[1:]) if flat else tuple(input.shape)
        timed = {3: {1}, 4: {2, 3}}.get(len(shape), set())  # [rows, time, features], [rows, heads, time, time]
        timed = {axis for axis in timed if shape[axis] == self.time}
        noise = input.new_ones(shape)
        for span in self.spans:
            own = span.masks
            size = (own.rows, *(own.time if axis in timed else shape[axis] for axis in range(1, len(shape))))
            mask = own.get(self._questions, size, 1.0 - p)
            shown = (slice(None), *(slice(min(a, b)) for a, b in zip(size[1:], shape[1:], strict=True)))
            mask = mask if len(span.chosen) == own.rows else mask[span.chosen]
            noise[span.start : span.stop][shown] = mask[shown]
        self._questions += 1
        return noise.div_(1.0 - p).view(input.shape)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """softmax(q k^T scale + mask) v, in float32 like torch's own, with dropout on the softmax where there is one."""
        import torch
        from torch.nn import functional

        if dropout_p == 0.0:
            return functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        dtype = query.dtype
        query, key, value = query.float(), key.float(), value.float()
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        root = math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = (query * root) @ (key * root).transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return (self._dropout(scores.softmax(-1), dropout_p) @ value).to(dtype)
