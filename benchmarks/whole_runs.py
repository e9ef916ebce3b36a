"""A whole run of fedpeft against the same run by Flower's simulation: each a process of its own, started and waited for.

Wall time, CPU time and memory are those of the process and all that it starts, Ray included. Memory is the largest sum of
proportional set sizes (pages that processes share count once); both are looked at five times a second (Linux).
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from peft_loop import Work
from safetensors.numpy import load_file

from fedpeft.config import Config
from fedpeft.quiet import quiet_libraries

HERE = pathlib.Path(__file__).parent
ROUNDS, TESTED = 2, 16
TICKS = os.sysconf("SC_CLK_TCK")


def compare(data: pathlib.Path, clients: int, batch: int, steps: int, repetitions: int = 1) -> dict[str, Any]:
    """One row: MiniLM on AG News, LoRA r = 8 on query and value, `clients` in each of two rounds."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        config = write_data(data, place, clients, batch, steps)
        prepare(config, place)
        commands = {
            "fedpeft": [sys.executable, "-m", "fedpeft", "simulate", str(place / "config.yaml"), "--json"],
            "cached": [sys.executable, "-c", f"import flower_peft; flower_peft.main({folder!r}, 'cached')"],
            "loads": [sys.executable, "-c", f"import flower_peft; flower_peft.main({folder!r}, 'loads')"],
        }
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for repetition in range(repetitions):
            for name, command in commands.items():
                out = ["--out", str(place / f"run-{repetition}")] if name == "fedpeft" else []
                measured[name].append(watch([*command, *out], place / f"{name}.log"))
        rounds = [json.loads(line) for line in (place / "run-0" / "rounds.jsonl").read_text().splitlines()]
        ours = from_peft(place / "run-0" / "adapter")
        apart = {name: differ(ours, dict(np.load(place / f"{name}.npz"))) for name in ("cached", "loads")}
        seconds = {name: json.loads((place / f"{name}.json").read_text())["rounds"] for name in ("cached", "loads")}
    seconds["fedpeft"] = [sum(line["seconds"].values()) for line in rounds[1:]]
    medians = {name: {key: float(np.median([one[key] for one in all])) for key in all[0]} for name, all in measured.items()}
    return {"clients": clients, "batch": batch, "steps": steps, "whole": medians, "round_seconds": seconds, "farthest": apart}


def write_data(data: pathlib.Path, place: pathlib.Path, clients: int, batch: int, steps: int) -> Config:
    with gzip.open(data / "ag_news" / "train.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, count in (("train", clients * batch * steps), ("test", TESTED)):
        with (place / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "client"])
            writer.writerows([rows[n % len(rows)]["text"], rows[n % len(rows)]["label"], f"{n % clients:05d}"] for n in range(count))
    training = {"max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 1e-3, "head_init": "random", "engine": "many"}
    settings = {
        "name": "whole",
        "model": {"name": "minilm", "dropout": False},
        "data": {"name": str(place), "max_length": 64},
        "partition": {"name": "natural"},
        "adapter": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
        "strategy": {"num_rounds": ROUNDS},
        "training": training,
    }
    config = Config.from_dict(settings)
    (place / "config.yaml").write_text(config.to_yaml())
    return config


def prepare(config: Config, place: pathlib.Path) -> None:
    """What Flower's clients read: each client's tokens and batches, and what all start from. Not timed."""
    from fedpeft.base import minilm_folder
    from fedpeft.simulations.assemble import assemble
    from fedpeft.training.job import Job, batches, dropout_seed, rates

    with quiet_libraries():
        parts = assemble(config)
    np.savez(place / "start.npz", **parts.adapted.read())
    for client, node in parts.worker.nodes.items():
        for round in range(1, ROUNDS + 1):
            job = Job(client, round, {}, (), node.train)
            clipping = config.training.max_grad_norm or 1e9
            steps = [part for (part,) in batches(config, job)]
            speeds = rates(config, len(node.train), round)
            work = Work(node.train.inputs, list(node.train.labels), steps, speeds, dropout_seed(config, job), 0.0, clipping)
            (place / f"client-{client}-round-{round}.pickle").write_bytes(pickle.dumps(work))
    spec = {"clients": len(parts.worker.nodes), "rounds": ROUNDS, "kind": "minilm", "base": minilm_folder(), "labels": 4}
    (place / "spec.json").write_text(json.dumps(spec))


def watch(command: list[str], log: pathlib.Path) -> dict[str, float]:
    """Run it to its end."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    started, spent, peak = time.perf_counter(), dict[int, float](), 0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths})
        while process.poll() is None:
            sizes = 0
            for pid in tree(process.pid):
                try:
                    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
                    rollup = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                spent[pid] = (int(fields[11]) + int(fields[12])) / TICKS
                sizes += next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
            peak = max(peak, sizes)
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command[-1]} failed:\n{log.read_text()[-3000:]}")
    return {"wall_seconds": time.perf_counter() - started, "cpu_seconds": sum(spent.values()), "peak_bytes": peak}


def tree(root: int) -> list[int]:
    """The process and all that it started."""
    parents: dict[int, list[int]] = {}
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(") ")[2].split()[1])
        except (OSError, IndexError):
            continue
        parents.setdefault(parent, []).append(int(place.name))
    found, left = [], [root]
    while left:
        found.append(left.pop())
        left += parents.get(found[-1], [])
    return found


def from_peft(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def differ(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
