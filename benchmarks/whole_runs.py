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
from contest import FAST, changed, farthest, work
from safetensors.numpy import load_file

from fedpeft.base import minilm_folder
from fedpeft.config import Config
from fedpeft.quiet import quiet_libraries
from fedpeft.simulations.assemble import Parts, assemble
from fedpeft.training.evaluate import evaluate
from fedpeft.training.job import Job

HERE = pathlib.Path(__file__).parent
TESTED = 500
TICKS = os.sysconf("SC_CLK_TCK")


def compare(data: pathlib.Path, clients: int, batch: int, steps: int, rounds: int, repetitions: int = 1) -> dict[str, Any]:
    """One row: MiniLM on AG News, LoRA r = 8 on query and value, all clients in each round. `fast` is fedpeft with contest.FAST."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        configs = write_data(data, place, clients, batch, steps, rounds)
        parts = {name: loaded(config, place) for name, config in configs.items()}
        prepare(configs["fedpeft"], parts["fedpeft"], place)
        commands = {name: [sys.executable, "-m", "fedpeft", "simulate", str(place / f"{name}.yaml"), "--json"] for name in configs}
        for name in ("cached", "loads"):
            commands[name] = [sys.executable, "-c", f"import flower_peft; flower_peft.main({folder!r}, {name!r})"]
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for repetition in range(repetitions):
            for name, command in commands.items():
                out = ["--out", str(place / f"{name}-{repetition}")] if name in configs else []
                measured[name].append(watch([*command, *out], place / f"{name}.log"))
        ended = {name: load_file(place / f"{name}-0" / "adapter" / "adapter_model.safetensors") for name in configs}
        ended |= {name: dict(np.load(place / f"{name}.npz")) for name in ("cached", "loads")}
        seconds = {name: json.loads((place / f"{name}.json").read_text())["rounds"] for name in ("cached", "loads")}
        for name in configs:
            lines = [json.loads(line) for line in (place / f"{name}-0" / "rounds.jsonl").read_text().splitlines()]
            seconds[name] = [sum(line["seconds"].values()) for line in lines[1:]]
    medians = {name: {key: float(np.median([one[key] for one in all])) for key in all[0]} for name, all in measured.items()}
    accuracy = {}
    for name, arrays in ended.items():
        own = parts.get(name, parts["fedpeft"])
        accuracy[name] = evaluate(own.adapted, own.task, arrays, own.test, 64)["accuracy"]
    row = {"clients": clients, "batch": batch, "steps": steps, "rounds": rounds, "whole": medians, "round_seconds": seconds}
    return {**row, "accuracy": accuracy, "farthest": {name: farthest([ended["fedpeft"]], [ended[name]]) for name in ("cached", "loads")}}


def write_data(data: pathlib.Path, place: pathlib.Path, clients: int, batch: int, steps: int, rounds: int) -> dict[str, Config]:
    """The examples, dealt out, and the configs that train on them. A run sees 16 test rows a round: to Flower none are given."""
    for part, count in (("train", clients * batch * steps), ("test", TESTED)):
        with gzip.open(data / "ag_news" / f"{part}.csv.gz", "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        table = [[rows[n % len(rows)]["text"], rows[n % len(rows)]["label"], f"{n % clients:05d}"] for n in range(count)]
        for folder, kept in (("data", 16 if part == "test" else count), ("tested", count)):
            (place / folder).mkdir(exist_ok=True)
            with (place / folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["text", "label", "client"], *table[:kept]])
    settings: dict[str, Any] = {
        "name": "whole",
        "model": {"name": "minilm", "dropout": False},
        "data": {"name": str(place / "data"), "max_length": 64},
        "partition": {"name": "natural"},
        "adapter": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
        "strategy": {"num_rounds": rounds},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": 5e-3,
            "head_init": "random",
            "engine": "many",
        },
    }
    configs = {"fedpeft": Config.from_dict(settings), "fast": Config.from_dict(changed(settings, FAST))}
    for name, config in configs.items():
        (place / f"{name}.yaml").write_text(config.to_yaml())
    return configs


def loaded(config: Config, place: pathlib.Path) -> Parts:
    """The run's parts with the whole test part, to evaluate every contestant alike."""
    with quiet_libraries():
        return assemble(Config.from_dict(changed(config.as_dict(), {"data": {"name": str(place / "tested")}})))


def prepare(config: Config, parts: Parts, place: pathlib.Path) -> None:
    """What Flower's clients read: each client's tokens and batches, and what all start from. Not timed."""
    np.savez(place / "start.npz", **parts.adapted.read())
    for client, node in parts.worker.nodes.items():
        for round in range(1, config.strategy.num_rounds + 1):
            mine = work(config, Job(client, round, {}, (), node.train))
            (place / f"client-{client}-round-{round}.pickle").write_bytes(pickle.dumps(mine))
    rounds, base = config.strategy.num_rounds, minilm_folder()
    spec = {"clients": len(parts.worker.nodes), "rounds": rounds, "kind": "minilm", "base": base, "labels": 4}
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
