"""What differential privacy of examples costs a training step: time and peak memory against the plain step.

    python benchmarks/privacy.py --data DIR [--quick] [--threads N]

DIR holds ag_news/ with train.csv.gz and test.csv.gz (columns text and label). MiniLM in float32, adapters of rank 8 on query
and value (or on all linear layers), texts cut at 64 tokens, AdamW, engine `one`. A client of exactly one batch takes plain
steps and private steps (q = 1) over the same rows in turn: what differs is per-example gradients, clipping, noise from
ChaCha20, and nothing else.

Ratios are medians over repetitions of one turn of each, in CPU time (other work on the machine does not count) and wall time.
Memory is the peak of what torch allocates within a turn, beyond the loaded model, plus the peak of NumPy's. Writes
benchmarks/results/privacy.json row by row (not with --quick); the same command goes on where it was cut off, and a new start
begins with that file's removal.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from fedpeft import Config  # noqa: E402
from fedpeft.privacy.mechanism import Mechanism  # noqa: E402
from fedpeft.privacy.noise import Secure  # noqa: E402
from fedpeft.quiet import quiet_libraries  # noqa: E402
from fedpeft.simulations.assemble import assemble  # noqa: E402
from fedpeft.strategies.strategy import Round  # noqa: E402
from fedpeft.training import one  # noqa: E402
from fedpeft.training.job import Job  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
TARGETS = {"query, value": ["query", "value"], "all": "all-linear"}
TARGET = 1.10  # of time, and of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true", help="batch 8 alone, three repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    steps, repetitions = (2, 3) if given.quick else (2, 5)
    cases = [(strategy, targets, batch) for strategy in ("fedavg", "ffa_lora") for targets in TARGETS for batch in (8, 16, 32)]
    path, rows = RESULTS / "privacy.json", []
    if path.exists() and not given.quick:  # cut off before: the rows that are there stay
        rows = json.loads(path.read_text())["rows"]
    done = {(row["strategy"], row["targets"], row["batch"]) for row in rows}
    for case in cases:
        if case in done or (given.quick and case[2] > 8):
            continue
        row = dict(zip(("strategy", "targets", "batch"), case, strict=True)) | {"load": round(os.getloadavg()[0], 1)}
        rows.append(row | measure(given.data, *case, steps, repetitions))
        print(json.dumps(rows[-1]), flush=True)
        if not given.quick:
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps({**facts(steps, repetitions), "rows": rows}, indent=1) + "\n")
    print("\n| strategy | adapted | batch | plain ms a step | CPU time | wall time | memory |\n|---|---|---|---|---|---|---|")
    for row in rows:
        ratios = " | ".join(f"{row[key]:.3f}" for key in ("cpu_ratio", "wall_ratio", "memory_ratio"))
        print(f"| {row['strategy']} | {row['targets']} | {row['batch']} | {row['plain_cpu_ms']:.0f} | {ratios} |")


def facts(steps: int, repetitions: int) -> dict[str, Any]:
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "steps": steps,
        "repetitions": repetitions,
        "target": TARGET,
    }


def measure(data: pathlib.Path, strategy: str, targets: str, batch: int, steps: int, repetitions: int) -> dict[str, float]:
    turns = contest(data, strategy, targets, batch, steps)
    for turn in turns.values():
        turn()
    cpu: dict[str, list[float]] = {name: [] for name in turns}
    wall: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repetitions):
        for name, turn in turns.items():
            clocks = time.process_time(), time.perf_counter()
            turn()
            cpu[name].append(time.process_time() - clocks[0])
            wall[name].append(time.perf_counter() - clocks[1])
    peaks = {name: peak(turn) for name, turn in turns.items()}
    return {
        "plain_cpu_ms": 1000 * statistics.median(cpu["plain"]) / steps,
        "private_cpu_ms": 1000 * statistics.median(cpu["private"]) / steps,
        "cpu_ratio": ratio(cpu),
        "wall_ratio": ratio(wall),
        "plain_peak_bytes": peaks["plain"],
        "private_peak_bytes": peaks["private"],
        "memory_ratio": peaks["private"] / peaks["plain"],
    }


def ratio(seconds: dict[str, list[float]]) -> float:
    """The median over repetitions, each of which had a turn of either."""
    return statistics.median(private / plain for private, plain in zip(seconds["private"], seconds["plain"], strict=True))


def contest(data: pathlib.Path, strategy: str, targets: str, batch: int, steps: int) -> dict[str, Callable[[], Any]]:
    config = Config.from_dict(
        {
            "data": {"name": str(data / "ag_news"), "max_length": 64, "max_examples": 400},
            "partition": {"name": "iid", "clients": 2},
            "adapter": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": TARGETS[targets]},
            "strategy": {"name": strategy},
            "training": {"head_init": "random", "max_steps": steps, "per_device_train_batch_size": batch, "lr_scheduler_type": "constant"},
        }
    )
    with quiet_libraries():
        parts = assemble(config)
    adapted, rows = parts.adapted, parts.worker.nodes[0].train.take(np.arange(batch))
    names = parts.strategy.trains(adapted.trained, Round(1, 1, adapted.layout()))
    start = adapted.read()

    def turn(private: bool) -> None:
        mechanism = Mechanism(sigma=1.0, C=1.0, q=1.0, batch=float(batch), noise=Secure()) if private else None
        (trained,) = one.train(adapted, parts.task, config, [Job(0, 1, start, names, rows, private=mechanism)])
        assert set(trained.arrays) == set(names)

    return {"plain": lambda: turn(False), "private": lambda: turn(True)}


def peak(turn: Callable[[], Any]) -> float:
    """Peak bytes within a turn: torch's own, by its profiler, and NumPy's."""
    tracemalloc.start()
    turn()
    numpy_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.profiler.profile(profile_memory=True) as profile:
        turn()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest + numpy_peak


if __name__ == "__main__":
    main()
