"""Thousands of clients on one machine: what one more client of a round costs, and one more that is only registered.

    python benchmarks/scale.py [--quick] [--registered N]

A two-layer BERT of width 32 (MiniLM's tokenizer), four made-up sentences a client, fedavg with LoRA of rank 4 and a head that
starts at random, engine `many`, three rounds of two steps. Each row is a process of its own: seconds are those of the rounds, memory is
the resident size once the federation is loaded and the most it came to beyond that. `aggregation` is the most that Python
held for the updates of a round, by tracemalloc, where 1,000 made-up adapters of MiniLM's shape are combined, in adapters.
Writes benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import pathlib
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedpeft import environment

environment.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from fedpeft import Config, simulate  # noqa: E402
from fedpeft.base import minilm_folder  # noqa: E402
from fedpeft.lookup import find  # noqa: E402
from fedpeft.quiet import quiet_libraries  # noqa: E402
from fedpeft.records import Layout, Pair, RoundRecord, TensorSpec, Update  # noqa: E402
from fedpeft.screen import Plain  # noqa: E402
from fedpeft.strategies.strategy import Round  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
WORDS = {
    "sport": "team match goal coach player cup",
    "money": "bank rate share profit loan fund",
    "space": "rocket orbit moon star planet sun",
}
EXAMPLES, ROUNDS, STEPS = 4, 3, 2
AGGREGATED = ("fedavg", "ffa_lora", "fed_svd", "scaffold")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--registered", type=int, help="clients there are; 10,000 unless --quick")
    given = parser.parse_args()
    part = 10 if given.quick else 1
    registered = given.registered or 10_000 // part
    sizes = [(registered, asked // part) for asked in (100, 250, 500, 1000)] + [(registered // 10, 100 // part)]
    held = {name: in_a_process(aggregation, name, 1000 // part) for name in AGGREGATED}
    print(json.dumps(held), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        write_model(place / "model")
        for clients, asked in sizes:
            rows.append(in_a_process(play, place, clients, asked))
            print(json.dumps(rows[-1]), flush=True)
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__},
        "quick": given.quick,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale.json").write_text(json.dumps({**facts, "rows": rows, "aggregation": held}, indent=1) + "\n")
    table(rows)
    print("\nadapters held while 1,000 are combined: " + ", ".join(f"{name} {peak:.2f}" for name, peak in held.items()))


def table(rows: list[dict[str, Any]]) -> None:
    columns = ["registered", "asked a round", "seconds a round", "ms a client", "CPU ms a client", "loaded MB", "beyond that MB"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        seconds, beyond = row["seconds_a_round"], row["peak_bytes"] - row["loaded_bytes"]
        each = [f"{1000 * spent / row['asked']:.2f}" for spent in (seconds, row["cpu_seconds_a_round"])]
        cells = [f"{row['registered']:,}", f"{row['asked']:,}", f"{seconds:.2f}", *each, f"{row['loaded_bytes'] / 1e6:.0f}"]
        print("| " + " | ".join([*cells, f"{beyond / 1e6:.0f}"]) + " |")


def write_model(folder: pathlib.Path) -> None:
    """A BERT with random weights, as Transformers saves it."""
    with quiet_libraries():
        torch.manual_seed(0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def play(place: pathlib.Path, clients: int, asked: int) -> dict[str, Any]:
    """A run with so many clients, so many of them asked in a round."""
    data = place / f"{clients}.csv"
    draw = np.random.default_rng(0)
    with data.open("w", encoding="utf-8") as file:
        print("text,label", file=file)
        for number in range(clients * EXAMPLES + 300):
            label = list(WORDS)[number % len(WORDS)]
            words = [*WORDS[label].split(), *" ".join(WORDS.values()).split()]  # a third of them say nothing of the topic
            print(" ".join(draw.choice(words, 6)), label, sep=",", file=file)
    config = Config.from_dict(
        {
            "name": "scale",
            "model": {"name": str(place / "model")},
            "data": {"name": str(data), "max_length": 16, "test_fraction": 300 / (clients * EXAMPLES + 300)},
            "partition": {"name": "iid", "clients": clients},
            "adapter": {"name": "lora", "r": 4, "target_modules": ["query", "value"]},
            "strategy": {"num_rounds": ROUNDS, "fraction_train": asked / clients},
            "training": {
                "engine": "many",
                "max_steps": STEPS,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "head_init": "random",
            },
        }
    )
    screen = Watching()
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        summary = simulate(config, pathlib.Path(out) / "run", screen=screen).summary
        whole = time.perf_counter() - begun
        written = sum(path.stat().st_size for path in (pathlib.Path(out) / "run").rglob("*") if path.is_file())
    return {
        "registered": clients,
        "asked": asked,
        "accepted": [record.accepted for record in screen.records],
        "seconds_a_round": float(np.median([sum(record.seconds.values()) for record in screen.records[1:]])),
        "cpu_seconds_a_round": float(np.median(np.diff(screen.cpu)[1:])),
        "cpu_seconds_before": screen.cpu[1] - screen.cpu[0],
        "seconds": [record.seconds for record in screen.records],
        "whole_run_seconds": whole,
        "loaded_bytes": screen.loaded,
        "peak_bytes": resident("VmHWM"),
        "adapter_bytes": 4 * summary["trainable_parameters"],
        "run_folder_bytes": written,
        "accuracy": summary["metrics"]["accuracy"],
    }


class Watching(Plain):
    """Keeps the records, and the memory once everything is loaded."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.records: list[RoundRecord] = []

    def started(self, config: Config, facts: Mapping[str, Any]) -> None:
        """The peak begins here."""
        self.loaded, self.cpu = resident("VmRSS"), [time.process_time()]
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        super().started(config, facts)

    def round_done(self, record: RoundRecord, num_rounds: int) -> None:
        """A round is over, or the time before the first."""
        self.cpu.append(time.process_time())
        self.records.append(record)


def aggregation(name: str, clients: int) -> float:
    """The most memory that combining so many updates takes, in adapters of float32 of MiniLM's shape (r = 8, query and value)."""
    layout, size = minilm_layout()
    strategy = find("strategy", name)()
    at = Round(1, 10, layout, clients=clients)
    received = {name: np.zeros(spec.shape, spec.dtype) for name, spec in layout.tensors.items()}
    received |= strategy.extras(received)
    specs = strategy.uploads(tuple(layout.tensors), at)

    def arriving(clients: int) -> Iterator[Update]:
        for client in range(clients):
            draw = np.random.default_rng(client)
            yield Update(1, client, {name: draw.standard_normal(spec.shape, np.float32) for name, spec in specs.items()}, 1 + client % 7)

    strategy.combine(arriving(2), received, at)  # what is imported and cached on the way is not counted
    gc.collect()
    tracemalloc.start()
    strategy.combine(arriving(clients), received, at)
    return tracemalloc.get_traced_memory()[1] / size


def minilm_layout() -> tuple[Layout, int]:
    """The layout of an adapter, and its bytes in float32."""
    modules = [f"layer.{layer}.{part}" for layer in range(6) for part in ("query", "value")]
    pairs = tuple(Pair(module, f"{module}.A", f"{module}.B", 2.0, 8) for module in modules)
    tensors = {pair.A: TensorSpec((8, 384), "float32") for pair in pairs} | {pair.B: TensorSpec((384, 8), "float32") for pair in pairs}
    tensors |= {"head.weight": TensorSpec((4, 384), "float32"), "head.bias": TensorSpec((4,), "float32")}
    return Layout(tensors, pairs), 4 * sum(int(np.prod(spec.shape)) for spec in tensors.values())


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Called where nothing was run before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def resident(kind: str) -> int:
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
