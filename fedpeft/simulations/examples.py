"""What the model will see: some examples of a split as they go into a batch, decoded, with what trains marked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedpeft import base
from fedpeft.base import Base
from fedpeft.config import Config
from fedpeft.errors import Problems
from fedpeft.simulations.assemble import Split
from fedpeft.training import prepare


def show(config: Config, split: Split, count: int) -> Iterator[str]:
    """Lines about `count` examples of the first client, batched together, without any weights being loaded. Raises UserError."""
    task, problems = config.model.build(), Problems()
    examples, names = split.corpus.train, split.partition.names
    prepare.check(config, len(examples.label_names), problems)
    problems.raise_if_any()
    light = Base(base.skeleton(config.model, task, len(examples.label_names)), base.processor(config.model, task), "cpu", "")
    mine = examples.take(split.partition.indices[0][:count])
    encoded = task.encode(mine, light, config.data)
    for row, reason in sorted(encoded.left_out.items()):
        yield f"client {names[0]}, row {_row(mine.rows, row)}: skipped: {reason}"
    kept = np.setdiff1d(np.arange(len(mine)), sorted(encoded.left_out))
    if not len(kept):
        return
    inputs, labels = encoded.batch(kept, light.tokenizer, "cpu")
    for place, row in enumerate(kept):
        said = {name: values[place].numpy() for name, values in inputs.items()}
        facts, text = task.tell(said, labels[place].numpy(), examples.label_names, light)
        yield f"client {names[0]}, row {_row(mine.rows, int(row))}: {facts}"
        yield f"    {text}"


def _row(rows: np.ndarray[tuple[int], np.dtype[np.int64]] | None, place: int) -> int:
    return place + 1 if rows is None else int(rows[place])
