"""Engine `many` against engine `one`, a plain PEFT loop, and the matrix products that no engine can do without.

    python benchmarks/engine.py --data DIR [--quick] [--threads N]

DIR holds ag_news/ with train.csv.gz and test.csv.gz (columns text and label). MiniLM in float32, LoRA of rank 8 on query
and value, texts cut at 64 tokens, AdamW; every contestant trains the same clients on the same batches from the same start.

  loop   one model, the adapter swapped in and out by PEFT's own functions, a client after another, as it is usually written
  one    the reference engine
  many   all clients in one pass
  floor  the products with the base's own weights alone, forward and backward, over the tokens without any padding

Contestants take turns within each repetition; the table has medians and their ratios, each with the dropout that the model's
config asks for and without. Memory is the peak beyond the loaded model, in a process of its own. `rounding` is how far the
loop comes from itself when every batch is padded to the full 64 tokens, which changes nothing but the order of sums. Writes
benchmarks/results/engine.json.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from fedpeft import Config  # noqa: E402
from fedpeft.base import minilm_folder  # noqa: E402
from fedpeft.quiet import quiet_libraries  # noqa: E402
from fedpeft.records import Arrays  # noqa: E402
from fedpeft.simulations.assemble import Parts, assemble  # noqa: E402
from fedpeft.training import many, one  # noqa: E402
from fedpeft.training.job import Job, batches, dropout_seed, rates  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
MAX_LENGTH = 64
CONTESTANTS = ("loop", "one", "many", "floor")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    clients: int
    batch: int
    dropout: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one case, two steps, three repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.quick:
        cases, steps, repetitions = [Case(8, 8, True), Case(8, 8, False)], 2, 3
    else:
        cases = [Case(clients, batch, dropout) for dropout in (True, False) for clients in (8, 32) for batch in (4, 8, 16)]
        steps, repetitions = 5, 5
    rows = []
    for case in cases:
        rows.append(measure(case, given.data / "ag_news", steps, repetitions))
        print(json.dumps(rows[-1]), flush=True)
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "steps": steps,
        "repetitions": repetitions,
        "quick": given.quick,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "engine.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    table(rows)


def table(rows: Sequence[dict[str, Any]]) -> None:
    columns = [
        "clients",
        "batch",
        "dropout",
        "loop s",
        "loop / one",
        "loop / many",
        "many / floor",
        "CPU time: loop / many",
        "many / floor",
    ]
    columns += ["memory: many / loop", "farthest from loop", "rounding"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        wall, cpu, peak = row["wall_seconds"], row["cpu_seconds"], row["peak_bytes"]
        ratios = [wall["loop"] / wall["one"], wall["loop"] / wall["many"], wall["many"] / wall["floor"]]
        ratios += [cpu["loop"] / cpu["many"], cpu["many"] / cpu["floor"], peak["many"] / peak["loop"]]
        facts = [row["clients"], row["batch"], "on" if row["dropout"] else "off", f"{wall['loop']:.2f}", *(f"{r:.2f}" for r in ratios)]
        rounding = "" if row["rounding"] is None else f"{row['rounding']:.1e}"
        print("| " + " | ".join(map(str, [*facts, f"{row['farthest']:.1e}", rounding])) + " |")


class Contest:
    """A case, loaded: the clients' jobs and what trains them."""

    def __init__(self, case: Case, data: pathlib.Path, steps: int) -> None:
        training = {"max_steps": steps, "per_device_train_batch_size": case.batch, "learning_rate": 1e-3, "head_init": "random"}
        self.config = Config.from_dict(
            {
                "model": {"name": "minilm"},
                "data": {"name": str(data), "max_length": MAX_LENGTH, "max_examples": 100 * case.clients},
                "partition": {"name": "iid", "clients": case.clients},
                "adapter": {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
                "training": training,
            }
        )
        with quiet_libraries():
            self.parts = assemble(self.config)
            self.loop = Loop(self.parts, self.config)
        for model in (self.parts.adapted.model, self.loop.model):
            if not case.dropout:
                without_dropout(model)
        adapted, nodes = self.parts.adapted, self.parts.worker.nodes
        self.jobs = [Job(client, 1, adapted.read(), adapted.trained, node.train) for client, node in nodes.items()]
        rows = [(job, row) for job in self.jobs for step in batches(self.config, job) for part in step for row in part]
        self.tokens = sum(len(job.data.inputs[row]["input_ids"]) for job, row in rows)

    def run(self, name: str) -> list[Arrays]:
        """What `name` makes of every job; of the floor nothing comes."""
        if name == "loop":
            return [self.loop.train(job) for job in self.jobs]
        if name == "floor":
            products(self.parts, self.tokens)
            return []
        engine = {"one": one, "many": many}[name]
        return [trained.arrays for trained in engine.train(self.parts.adapted, self.parts.task, self.config, self.jobs)]


def measure(case: Case, data: pathlib.Path, steps: int, repetitions: int) -> dict[str, Any]:
    contest = Contest(case, data, steps)
    wall: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    cpu: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    results = {}
    for repetition in range(repetitions + 1):
        for name in CONTESTANTS:
            started = time.perf_counter(), time.process_time()
            results[name] = contest.run(name)
            if repetition:  # the first warms up
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.process_time() - started[1])
    padded = [contest.loop.train(job, MAX_LENGTH) for job in contest.jobs]
    return {
        "clients": case.clients,
        "batch": case.batch,
        "dropout": case.dropout,
        "tokens": contest.tokens,
        "wall_seconds": {name: statistics.median(taken) for name, taken in wall.items()},
        "cpu_seconds": {name: statistics.median(taken) for name, taken in cpu.items()},
        "peak_bytes": {name: in_a_process(peak_memory, name, case, data, steps) for name in ("loop", "one", "many")},
        "farthest": farthest(results["loop"], results["many"]),
        "farthest_one": farthest(results["loop"], results["one"]),
        "rounding": None if case.dropout else farthest(results["loop"], padded),
    }


def in_a_process(function: Callable[..., int], *arguments: Any) -> int:
    """Called where nothing was run before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(name: str, case: Case, data: pathlib.Path, steps: int) -> int:
    """Largest resident size beyond that of the loaded contest (Linux)."""
    contest = Contest(case, data, steps)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    contest.run(name)
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


class Loop:
    """Sequential clients with nothing but Transformers and PEFT: set the adapter, train, get the adapter."""

    def __init__(self, parts: Parts, config: Config) -> None:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=len(parts.split.corpus.train.label_names)
        )
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
        self.model = peft.get_peft_model(base, lora)
        self.tokenizer = parts.adapted.base.tokenizer
        self.config = config

    def train(self, job: Job, length: int | None = None) -> Arrays:
        """The client's adapter and head after its steps; every batch padded to `length`, or to its own longest row."""
        training = self.config.training
        peft.set_peft_model_state_dict(self.model, {name: torch.from_numpy(array) for name, array in job.start.items()})
        self.model.train()
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=training.learning_rate, weight_decay=training.weight_decay)
        torch.manual_seed(dropout_seed(self.config, job))
        for rate, (rows,) in zip(rates(self.config, len(job.data), job.round), batches(self.config, job), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            examples = [job.data.inputs[row] for row in rows]
            inputs = self.tokenizer.pad(examples, padding="max_length" if length else True, max_length=length, return_tensors="pt")
            loss = self.model(**inputs, labels=torch.from_numpy(job.data.labels[rows])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, training.max_grad_norm)
            optimizer.step()
        return {name: tensor.numpy().copy() for name, tensor in peft.get_peft_model_state_dict(self.model).items()}


def products(parts: Parts, tokens: int, at_once: int = 512) -> None:
    """x W^T and g W for every linear layer of the encoder: what the steps on so many tokens cost at the least."""
    weights = list(encoder_weights(parts))
    x = {width: torch.randn(at_once, width) for weight in weights for width in weight.shape}
    done = 0
    with torch.no_grad():
        while done < tokens:
            n = min(at_once, tokens - done)
            for weight in weights:
                x[weight.shape[1]][:n] @ weight.T
                x[weight.shape[0]][:n] @ weight
            done += n


def encoder_weights(parts: Parts) -> Iterator[torch.Tensor]:
    for name, module in parts.adapted.base.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "encoder" in name and "lora_" not in name:
            yield module.weight.detach()


def without_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def farthest(left: Sequence[Arrays], right: Sequence[Arrays]) -> float:
    """The largest difference of any number of any client."""
    return max(float(np.abs(a[name] - b[name]).max()) for a, b in zip(left, right, strict=True) for name in b)


if __name__ == "__main__":
    main()
