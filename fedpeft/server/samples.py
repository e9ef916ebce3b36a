"""RUN/samples.jsonl: what the model says of some test examples before and after the run, where the task has something to show."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fedpeft import durable
from fedpeft.adapters.adapted import Adapted
from fedpeft.data.examples import Examples
from fedpeft.records import Arrays, Metrics
from fedpeft.sections import DataSection
from fedpeft.server.run_folder import RunFolder
from fedpeft.tasks.task import Task

FILE, WHEN = "samples.jsonl", "when"


def keep(folder: RunFolder, task: Task, adapted: Adapted, when: str, arrays: Arrays, examples: Examples, data: DataSection) -> None:
    """Add the lines of "before" or "after", said with `arrays`, unless they are there already: a resumed run says nothing twice."""
    there = _lines(folder)
    if any(line[WHEN] == when for line in there):
        return
    adapted.write(arrays)
    if lines := [{WHEN: when, **line} for line in task.show(adapted, examples, data)]:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*there, *lines])
        durable.replace(folder.path / FILE, text.encode())


def scores(folder: RunFolder) -> dict[str, dict[str, Metrics]]:
    """For summary.json: the mean of every number in the lines of samples.jsonl, before and after; nothing where there are none."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in _lines(folder):
        for name, value in line.items():
            if isinstance(value, int | float):
                found.setdefault(line[WHEN], {}).setdefault(name, []).append(float(value))
    means = {when: {name: float(np.mean(values)) for name, values in numbers.items()} for when, numbers in found.items()}
    return {"samples": means} if means else {}


def _lines(folder: RunFolder) -> list[dict[str, Any]]:
    file = folder.path / FILE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line] if file.is_file() else []
