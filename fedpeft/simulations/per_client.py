"""RUN/clients.json: what each client holds, and how well the model at the end of a run serves it.

The metric is the task's primary one, measured on the first of these that there is, for all clients alike:

    validation   what the client kept back of its own examples (data.validation_fraction)
    test         rows of the server's test part that bear the client's name
    train        its own training examples, up to 20 a client, evenly spaced: how even the model is, not how good

Under differential privacy nothing is measured on the clients' own examples.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from fedpeft import durable
from fedpeft.config import Config
from fedpeft.data.encoded import Encoded, joined
from fedpeft.data.partitions import label_counts
from fedpeft.intervals import best
from fedpeft.records import Arrays
from fedpeft.server.run_folder import RunFolder
from fedpeft.simulations.assemble import Parts
from fedpeft.training.evaluate import of_every_record

EACH, ALL = 20, 2000  # training examples that are looked at, of a client and of all


def measure(config: Config, parts: Parts, arrays: Arrays, folder: RunFolder) -> dict[str, Any] | None:
    """Write clients.json; what summary.json says of it: metric, where it was measured, mean, worst client and variance over clients."""
    partition, train = parts.split.partition, parts.split.corpus.train
    counts, names = label_counts(partition, train), (*train.label_names, "none")
    lines: dict[str, dict[str, Any]] = {
        name: {"examples": len(rows)}
        | ({"labels": {names[code]: int(n) for code, n in enumerate(count) if n}} if train.labels is not None else {})
        for name, rows, count in zip(partition.names, partition.indices, counts, strict=True)
    }
    where, data = _measured_on(config, parts)
    values = _values(config, parts, arrays, data) if data else {}
    metric = parts.task.primary_metric
    for client, value in values.items():
        lines[partition.names[client]] |= {metric: value, "measured_on": where, "measured_examples": len(data[client])}
    durable.replace(folder.path / "clients.json", (json.dumps(lines, indent=2, ensure_ascii=False) + "\n").encode())
    if not values:
        return None
    lost = [client for client, value in values.items() if not math.isfinite(value)]
    worst = lost[0] if lost else best(values, not parts.task.higher_is_better)
    spread = list(values.values())
    return {
        "metric": metric,
        "measured_on": where,
        "clients": len(values),
        "mean": float(np.mean(spread)),
        "worst": values[worst],
        "worst_client": partition.names[worst],
        "variance": float(np.var(spread)),
    }


def _measured_on(config: Config, parts: Parts) -> tuple[str, dict[int, Encoded]]:
    """Where the clients are measured, and the examples of each that has any."""
    nodes, test = parts.worker.nodes, parts.split.corpus.test
    if any(node.validation for node in nodes.values()):
        return "validation", {client: node.validation for client, node in nodes.items() if node.validation}
    owners = np.array(test.clients or ())[parts.tested] if test.clients else np.array([])
    named = {client: np.flatnonzero(owners == name) for client, name in enumerate(parts.split.partition.names)}
    if any(len(rows) for rows in named.values()):
        return "test", {client: parts.test.take(rows) for client, rows in named.items() if len(rows)}
    if config.privacy is not None:
        return "", {}
    each = max(1, min(EACH, ALL // len(nodes)))
    return "train", {client: node.train.take(_spaced(len(node.train), each)) for client, node in nodes.items()}


def _spaced(count: int, wanted: int) -> np.ndarray[Any, Any]:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


def _values(config: Config, parts: Parts, arrays: Arrays, data: dict[int, Encoded]) -> dict[int, float]:
    """Client -> the primary metric of its model; one pass over all examples where that is the global model."""
    batch, task, metric = config.training.per_device_eval_batch_size, parts.task, parts.task.primary_metric
    memories = parts.worker.memory if parts.strategy.personal else {}
    if memories:
        found = {}
        for client, mine in data.items():
            parts.adapted.write({**arrays, **memories.get(client, {})})
            outputs = of_every_record(parts.adapted, mine, batch, task.outputs)
            found[client] = float(task.measure(outputs, mine.labels)[metric])
        return found
    parts.adapted.write(arrays)
    whole = joined(list(data.values()))
    outputs = of_every_record(parts.adapted, whole, batch, task.outputs)
    ends = np.cumsum([len(mine) for mine in data.values()])
    return {
        client: float(task.measure(outputs[end - len(mine) : end], mine.labels)[metric])
        for (client, mine), end in zip(data.items(), ends, strict=True)
    }
