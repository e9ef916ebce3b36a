"""The same accuracy, sooner: a federation trained by a sequential PEFT loop, and by `many` with what may be turned on beside it.

    python benchmarks/faster.py --data DIR [--seeds 3]

DIR holds ag_news/ with train.csv.gz and test.csv.gz. Eight clients of 200 descriptions, four rounds of ten AdamW steps of eight,
MiniLM without dropout, LoRA r = 8, plain averages. All contestants train on the same batches from the same kind of start and take
turns within a seed; the seconds are those of the training alone (CPU time and wall), on one thread.

  loop            one float32 model, PEFT's functions, a client after another, query and value of all six layers
  loop, bfloat16  the same with a base in bfloat16, as Transformers loads it
  many            all clients in one pass
  many, bfloat16  the same over a base in bfloat16
  upper half      many over bfloat16, adapters in the upper three layers alone, what lies below computed once an example

Writes benchmarks/results/faster.json, and prints the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from typing import Any

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import peft_loop  # noqa: E402
import torch  # noqa: E402
from contest import FAST, changed, work  # noqa: E402
from sets import subset  # noqa: E402
from tables import said  # noqa: E402

from fedpeft.base import minilm_folder  # noqa: E402
from fedpeft.config import Config  # noqa: E402
from fedpeft.intervals import estimate  # noqa: E402
from fedpeft.quiet import quiet_libraries  # noqa: E402
from fedpeft.records import Arrays  # noqa: E402
from fedpeft.simulations.assemble import Parts, assemble  # noqa: E402
from fedpeft.training import many  # noqa: E402
from fedpeft.training.evaluate import evaluate  # noqa: E402
from fedpeft.training.job import Job  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
ROUNDS = 4
CONFIG: dict[str, Any] = {
    "name": "faster",
    "model": {"name": "minilm", "dropout": False},
    "data": {"max_length": 64, "max_examples": 1600},
    "partition": {"name": "iid", "clients": 8},
    "adapter": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
    "strategy": {"num_rounds": ROUNDS},
    "training": {"max_steps": 10, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "head_init": "random", "engine": "many"},
}
HALF = {"model": FAST["model"]}
CONTESTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "loop": {},
    "loop, bfloat16": HALF,
    "many": {},
    "many, bfloat16": HALF,
    "upper half": FAST,
}
LOOPS = ("loop", "loop, bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        data = subset(given.data / "ag_news", pathlib.Path(folder))
        for seed in range(given.seeds):
            for name, changes in CONTESTANTS.items():
                rows[name].append(
                    measure(
                        name, Config.from_dict(changed({**CONFIG, "seed": seed, "data": {**CONFIG["data"], "name": str(data)}}, changes))
                    )
                )
                print(name, rows[name][-1], flush=True)
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "threads": 1}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "faster.json").write_text(json.dumps({**facts, "load": os.getloadavg()[0], "rows": rows}, indent=1) + "\n")
    print(table(rows))


def measure(name: str, config: Config) -> dict[str, float]:
    """A whole training: its seconds, and the accuracy of what it ends with."""
    with quiet_libraries():
        parts = assemble(config)
    kept = peft_loop.model("minilm", minilm_folder(), 4, dtype=config.model.dtype) if name in LOOPS else None
    if kept is not None:
        peft_loop.without_dropout(kept)
    arrays, wall, cpu = parts.adapted.read(), 0.0, 0.0
    for round in range(1, ROUNDS + 1):
        jobs = [Job(client, round, arrays, parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
        started = time.perf_counter(), time.process_time()
        ended = trained(kept, parts, config, jobs)
        arrays = {key: np.mean([one[key] for one in ended], axis=0, dtype=np.float64).astype(np.float32) for key in arrays}
        wall, cpu = wall + time.perf_counter() - started[0], cpu + time.process_time() - started[1]
    accuracy = evaluate(parts.adapted, parts.task, arrays, parts.test, 64)["accuracy"]
    del parts, kept
    gc.collect()
    return {"wall": wall, "cpu": cpu, "accuracy": accuracy}


def trained(model: Any, parts: Parts, config: Config, jobs: list[Job]) -> list[Arrays]:
    """What every job ends with: by the loop where there is a `model` for it."""
    if model is None:
        return [one.arrays for one in many.train(parts.adapted, parts.task, config, jobs)]  # type: ignore[union-attr]
    start = {name: torch.from_numpy(array) for name, array in jobs[0].start.items()}
    return [peft_loop.train(model, start, work(config, job)) for job in jobs]


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| contestant | accuracy | CPU s | CPU time: loop / | wall: loop / |", "|---|---|---|---|---|"]
    for name, all_ in rows.items():
        cpu, wall = ([loop[key] / one[key] for loop, one in zip(rows["loop"], all_, strict=True)] for key in ("cpu", "wall"))
        accuracy, seconds = said(estimate([one["accuracy"] for one in all_])), statistics.median(one["cpu"] for one in all_)
        lines.append(f"| {name} | {accuracy} | {seconds:.1f} | {statistics.median(cpu):.2f} | {statistics.median(wall):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
