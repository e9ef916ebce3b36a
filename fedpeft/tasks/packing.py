"""Several records in one row, none of which sees another: less padding, fewer rows.

Positions start again with every record, and the attention mask has a block a record. A model that lets them meet all the
same (a convolution over time, a state that runs on) is found by trying, and refused. So is one whose layers look back no further than
a window that records exceed: a mask given from outside takes the place of every layer's own.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.data.encoded import UNTRAINED, Encoded
from fedpeft.errors import Problem, UserError

if TYPE_CHECKING:
    import torch

    from fedpeft.base import Base

CHECKED: weakref.WeakSet[Any] = weakref.WeakSet()
WINDOWS = ("sliding_window", "attention_chunk_size")  # what configs call the tokens that a layer looks back
RECORD = "record_ids"  # [time]: which record of its row a token belongs to, counted from 1; 0 is padding


def packed(data: Encoded, size: int) -> Encoded:
    """Records in rows of at most `size` tokens: the longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for record in sorted(range(len(data)), key=lambda record: -data.length(record)):
        length = data.length(record)
        place = next((place for place, left in enumerate(room) if left >= length), None)
        if place is None:
            rows.append([])
            room.append(size)
            place = len(rows) - 1
        rows[place].append(record)
        room[place] -= length
    labels = np.empty(len(rows), dtype=object)
    for place, records in enumerate(rows):
        labels[place] = np.concatenate([data.labels[record] for record in records])
    return Encoded([_row(data, records) for records in rows], labels, data.label_count)


def _row(data: Encoded, records: list[int]) -> dict[str, np.ndarray[Any, Any]]:
    lengths = [data.length(record) for record in records]
    return {
        "input_ids": np.concatenate([data.inputs[record]["input_ids"] for record in records]),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        RECORD: np.repeat(np.arange(1, len(records) + 1), lengths),
    }


def apart(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs of packed rows with an attention mask [batch, 1, time, time] that keeps records apart; others as they are."""
    import torch

    if RECORD not in inputs:
        return inputs
    record = inputs[RECORD]
    time = torch.arange(record.shape[1], device=record.device)
    same = (record[:, :, None] == record[:, None, :]) & (time[:, None] >= time[None, :])
    forbidden = torch.zeros(same.shape, dtype=next(p.dtype for p in model.parameters() if p.is_floating_point()), device=record.device)
    forbidden.masked_fill_(~same, torch.finfo(forbidden.dtype).min)
    return {**{name: value for name, value in inputs.items() if name != RECORD}, "attention_mask": forbidden[:, None]}


def check(base: Base, longest: int) -> None:
    """Raises UserError when the model gives a packed record other logits than it gives the record alone. Tried once a model.

    Where records of `longest` tokens go beyond a window of the model's attention, one that does is tried.
    """
    import torch

    if base.model in CHECKED:
        return
    config = base.model.config.get_text_config()
    windows = [value for name in WINDOWS if isinstance(value := getattr(config, name, None), int) and value < longest]
    lengths, vocabulary = (5, max([7, *(window + 3 for window in windows)])), config.vocab_size
    tokens = [np.arange(3, 3 + length, dtype=np.int64) * (1 + place) % vocabulary for place, length in enumerate(lengths)]
    labels = np.empty(2, dtype=object)
    labels[:] = [np.full(length, UNTRAINED) for length in lengths]
    pair = packed(Encoded([{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in tokens], labels, 0), sum(lengths))
    inputs, _ = pair.batch(np.array([0]), base.tokenizer, base.device)
    training = base.model.training
    base.model.eval()
    try:
        with torch.no_grad():
            together = base.model(**apart(base.model, inputs)).logits[0].float()
            alone = [base.model(input_ids=torch.from_numpy(ids)[None].to(base.device)).logits[0].float() for ids in reversed(tokens)]
    except (RuntimeError, TypeError, ValueError) as error:
        got = f"the model takes no mask that keeps records apart ({str(error).splitlines()[0]})"
        raise UserError(Problem("model.packing", got, "false, with this model")) from error
    finally:
        base.model.train(training)
    apiece = torch.cat(alone)  # the longer one stands first in the row
    if not torch.allclose(together, apiece, atol=0.02 * float(apiece.abs().max())):
        got = "in this model records of one row see each other"
        if windows:
            got += f", or more of themselves than alone (its attention has a window of {min(windows)}, data.max_length is {longest})"
        raise UserError(Problem("model.packing", got, "false, with this model"))
    CHECKED.add(base.model)
