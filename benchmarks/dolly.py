"""Dolly by category: what a federation of eight gains over each client's own adapter, and how far it is from pooled data.

    python benchmarks/dolly.py --data DIR [--out FILE]

DIR holds dolly15k/ and models/stories260k/ (a real Llama of 260,032 parameters, trained on children's stories). Each of the
eight categories of instructions is a client. Three ways to spend the same local steps, from the same start:

  own        every client alone, with its own examples: eight adapters
  federated  fedavg: 6 rounds of 4 steps at every client
  central    one adapter on all the data, as many steps as a client takes, each on as many examples as all clients together

What is measured is the perplexity of the completions of the pooled test part, a tenth of every category. All three
ways have one learning rate. Every cell is kept as soon as it
is there: a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from fedpeft import Config, simulate  # noqa: E402
from fedpeft.data.encoded import joined  # noqa: E402
from fedpeft.intervals import estimate  # noqa: E402
from fedpeft.simulations.assemble import Parts, assemble  # noqa: E402
from fedpeft.training import many, one  # noqa: E402
from fedpeft.training.evaluate import evaluate  # noqa: E402
from fedpeft.training.job import Job, Trained  # noqa: E402

HERE = pathlib.Path(__file__).parent
ROUNDS, STEPS, BATCH, CLIENTS = 6, 4, 8, 8
SEEDS, RATE = (0, 1, 2), 1e-2


def config(data: pathlib.Path, seed: int, rate: float, split: str, **training: Any) -> Config:
    return Config.from_dict(
        {
            "name": "dolly",
            "seed": seed,
            "model": {"name": str(data / "models/stories260k"), "task": "causal-lm", "chat_template": "plain", "samples": 0},
            "data": {
                "name": str(data / "dolly15k/train.jsonl.gz"),
                "columns": {"prompt": "instruction", "context": "input", "completion": "output", "client": "category", "label": "category"},
                "max_length": 128,
                "max_examples": 3000,
                "test_fraction": 0.1,
                "evaluate_on": split,
            },
            "partition": {"name": "natural"},
            "adapter": {"name": "lora", "r": 8, "target_modules": "all-linear"},
            "strategy": {"name": "fedavg", "num_rounds": ROUNDS},
            "training": {
                "learning_rate": rate,
                "max_steps": STEPS,
                "per_device_train_batch_size": BATCH,
                "per_device_eval_batch_size": 32,
                "engine": "many",
                **training,
            },
        }
    )


def federated(data: pathlib.Path, seed: int, rate: float, split: str, out: pathlib.Path) -> dict[str, Any]:
    folder = out / f"{split}-{seed}-{rate}"
    summary = simulate(config(data, seed, rate, split), folder, resume=(folder / "config.yaml").is_file()).summary
    return {"perplexity": summary["metrics"]["perplexity"], "before": summary["initial"]["perplexity"]}


def own(data: pathlib.Path, seed: int, rate: float, split: str, out: pathlib.Path) -> dict[str, Any]:
    told = config(data, seed, rate, split, max_steps=ROUNDS * STEPS)
    told = told.model_copy(update={"strategy": told.strategy.model_copy(update={"num_rounds": 1})})
    parts = assemble(told)
    jobs = [job(parts, client, node.train) for client, node in parts.worker.nodes.items()]
    ended = many.train(parts.adapted, parts.task, told, jobs)
    each = {parts.split.partition.names[one.client]: measured(told, parts, got) for one, got in zip(jobs, ended, strict=True)}
    return {"perplexity": min(each.values()), "each": each}


def central(data: pathlib.Path, seed: int, rate: float, split: str, out: pathlib.Path) -> dict[str, Any]:
    told = config(data, seed, rate, split, max_steps=ROUNDS * STEPS, gradient_accumulation_steps=CLIENTS)
    told = told.model_copy(update={"strategy": told.strategy.model_copy(update={"num_rounds": 1})})
    parts = assemble(told)
    (ended,) = one.train(parts.adapted, parts.task, told, [job(parts, 0, joined([node.train for node in parts.worker.nodes.values()]))])
    return {"perplexity": measured(told, parts, ended)}


WAYS: dict[str, Callable[..., dict[str, Any]]] = {"own": own, "federated": federated, "central": central}


def job(parts: Parts, client: int, examples: Any) -> Job:
    return Job(client, 1, parts.adapted.read(), parts.adapted.trained, examples)


def measured(told: Config, parts: Parts, ended: Any) -> float:
    assert isinstance(ended, Trained), ended
    start = parts.adapted.read()
    return evaluate(parts.adapted, parts.task, {**start, **ended.arrays}, parts.test, told.training.per_device_eval_batch_size)[
        "perplexity"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/dolly"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "cells.json"
    cells: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}

    def cell(way: str, seed: int, rate: float, split: str) -> dict[str, Any]:
        key = f"{way} {split} {seed} {rate}"
        if key not in cells:
            started = time.perf_counter()
            cells[key] = {**WAYS[way](given.data, seed, rate, split, given.out / way), "seconds": time.perf_counter() - started}
            kept.write_text(json.dumps(cells, indent=1))
            print(key, cells[key], flush=True)
        found: dict[str, Any] = cells[key]
        return found

    rows = [{way: cell(way, seed, RATE, "test") for way in WAYS} for seed in SEEDS]
    write(rows)


def write(rows: list[dict[str, Any]]) -> None:
    """The JSON of everything, and the two shares of the gap that the federation closes."""
    closed = {}
    for against, pick in (("best own", min), ("mean own", np.mean)):
        values = []
        for row in rows:
            alone, together, pooled = (
                np.log(value)
                for value in (pick(list(row["own"]["each"].values())), row["federated"]["perplexity"], row["central"]["perplexity"])
            )
            values.append(float((alone - together) / (alone - pooled)))
        closed[against] = values
    beaten = [sum(row["federated"]["perplexity"] < value for value in row["own"]["each"].values()) for row in rows]
    facts = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "seeds": SEEDS}
    facts |= {
        "rounds": ROUNDS,
        "steps": STEPS,
        "batch": BATCH,
        "learning rate": RATE,
        "own adapters beaten": beaten,
        "share of the gap closed": closed,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "dolly.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
    for name, values in closed.items():
        print(f"gap closed against {name}: {estimate(values)}")


if __name__ == "__main__":
    main()
