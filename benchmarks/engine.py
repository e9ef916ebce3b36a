"""The engine `many` against the ways people simulate a federation now, and against the products that no engine can do without.

    python benchmarks/engine.py --data DIR [--sections minilm,llama,whole] [--clients 8,32,128] [--batches 4,8,16] [--quick]

DIR holds ag_news/train.csv.gz (columns text and label). LoRA of rank 8 on query and value, AdamW; every contestant trains the
same clients on the same batches from the same start, so that its numbers can be compared with the others'.

  loop     one model, the adapter swapped in and out by PEFT's own functions, a client after another, as it is usually written
  one      the reference engine (where there are 32 clients and batches of 8)
  many     all clients in one pass
  floor    the products with the base's own weights alone, forward and backward, over the tokens without any padding, as torch
           multiplies by itself; `our floor` is the same by fedpeft/frozen_linear.py, another where MKL is not the fastest
  cached   Flower's simulation on Ray with the loop's client, its model kept by each actor     (section whole)
  loads    the same, the model loaded for each message, as in Flower's examples                (section whole)
  fast     fedpeft over a base in bfloat16, adapters in the upper half, what lies below kept   (section whole)

Sections: MiniLM on AG News in float32; a Llama of random weights on random tokens; whole runs, from the command to the last
file, each in processes of its own. Contestants take turns; wall and CPU seconds are medians of the repetitions, memory is the
peak beyond the loaded model in a process of its own, or the largest GPU allocation. `farthest` is the largest difference of any
number of any client from the loop's. AdamW's first steps divide a gradient by its own size, so that rounding of a gradient near
zero comes out as a whole step: hence `rounding`, how far the loop comes from itself when every batch is padded to the full length,
which changes nothing but the order of sums, and `by SGD`, the same difference after the same steps of SGD at 0.1. Results go to
benchmarks/results/engine.json (--out), section by section as they come; the rows of one section are of one run.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from fedpeft import environment

environment.prepare()

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from contest import FLOORS, Case, Contest, farthest, write_llama  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / "results"
CONTESTANTS = ("loop", "many", "floor", "our floor")
STEPS = {8: 2}  # of a client; one where there are more clients
WHOLE = {8: (10, 6), 32: (5, 3), 128: (2, 2)}  # steps and rounds of a whole run, some 500 steps of a client in all
SMALL = 128  # examples a step, up to which differences are looked into
SHAPE = {"cpu": "small", "cuda": "1b"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, help="needed by the sections minilm and whole")
    parser.add_argument("--sections", default="minilm,llama,whole")
    parser.add_argument("--clients", default="8,32,128")
    parser.add_argument("--batches", default="4,8,16")
    parser.add_argument("--shape", help="of the Llama: tiny, small (on a CPU), 1b (on a GPU)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the Llama's base")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of a client; by default two of 8 clients and one of more")
    parser.add_argument("--quick", action="store_true", help="one small case of each section")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "engine.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    clients, batches = ([8], [4]) if given.quick else (numbers(given.clients), numbers(given.batches))
    sections = given.sections.split(",")
    if given.data is None and {"minilm", "whole"} & set(sections):
        parser.error("--data is needed for the sections minilm and whole")
    cells = sorted(((c, b) for c in clients for b in batches), key=lambda cell: (cell[0] * cell[1], cell[0]))
    kept = Kept(given.out, given.device, given.quick)
    with tempfile.TemporaryDirectory() as folder:
        for section in sections:
            rows: list[dict[str, Any]] = []
            if section == "whole":
                from whole_runs import compare

                for count in clients:
                    steps, rounds = WHOLE.get(count, (1, 2))
                    rows.append(compare(given.data, count, 8, steps, rounds, given.repetitions))
                    kept.put(section, rows)
                whole_table(rows)
                continue
            base = ""
            if section == "llama":
                base = str(
                    write_llama(
                        pathlib.Path(folder) / "llama", given.shape or SHAPE[given.device[:4].rstrip(":")], given.dtype, given.device
                    )
                )
            for count, batch in cells:
                dtype = given.dtype if section == "llama" else "float32"
                case = Case(section, count, batch, given.steps or STEPS.get(count, 1), False, base, str(given.data), given.device, dtype)
                rows.append(measure(case, given.repetitions))
                kept.put(section, rows)
            engine_table(rows)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class Kept:
    """The results file: sections that were not measured now stay as they are."""

    def __init__(self, path: pathlib.Path, device: str, quick: bool) -> None:
        self.path = path
        path.parent.mkdir(exist_ok=True)
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{platform.machine()}, {os.cpu_count()} cores"
        self.facts = {
            "machine": name,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
            "quick": quick,
        }

    def put(self, section: str, rows: list[dict[str, Any]]) -> None:
        """Write a section, and show its last row."""
        print(json.dumps(rows[-1]), flush=True)
        found = json.loads(self.path.read_text()) if self.path.is_file() else {}
        found = found if "sections" in found else {"sections": {}}
        found["sections"][section] = {**self.facts, "load": os.getloadavg()[0], "rows": rows}
        self.path.write_text(json.dumps(found, indent=1) + "\n")


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """One row of the sections minilm and llama."""
    contest = Contest(case)
    names = [*CONTESTANTS, *(["one"] if (case.clients, case.batch) in {(32, 8), (8, 4)} else [])]
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    warm = Contest(dataclasses.replace(case, clients=2, batch=2, steps=1))
    for name in names:
        warm.run(name)
    del warm
    results = {}
    for _ in range(repetitions):
        for name in names:
            synchronise(case.device)
            started = time.perf_counter(), time.process_time()
            results[name] = contest.run(name)
            synchronise(case.device)
            wall[name].append(time.perf_counter() - started[0])
            cpu[name].append(time.process_time() - started[1])
    small = case.clients * case.batch <= SMALL
    measured = case.batch == 8 or case.device.startswith("cuda")
    return {
        **{key: getattr(case, key) for key in ("clients", "batch", "steps", "dropout", "device", "dtype")},
        "tokens": contest.tokens,
        "floor_flops": contest.flops,
        "wall_seconds": {name: statistics.median(taken) for name, taken in wall.items()},
        "cpu_seconds": {name: statistics.median(taken) for name, taken in cpu.items()},
        "peak_bytes": {name: in_a_process(peak_memory, name, case) for name in ("loop", "many")} if measured else None,
        "farthest": farthest(results["loop"], results["many"]),
        "rounding": farthest(results["loop"], contest.padded()) if small else None,
        "by_sgd": by_sgd(dataclasses.replace(case, optimizer="sgd")) if small else None,
    }


def by_sgd(case: Case) -> float:
    contest = Contest(case)
    return farthest(contest.run("loop"), contest.run("many"))


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def in_a_process(function: Callable[..., int], *arguments: Any) -> int:
    """Called where nothing was run before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(name: str, case: Case) -> int:
    """Largest resident size beyond that of the loaded contest (Linux), or the largest allocation on a GPU."""
    contest = Contest(case)
    gc.collect()
    if case.device.startswith("cuda"):
        before = torch.cuda.memory_allocated(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        contest.run(name)
        return int(torch.cuda.max_memory_allocated(case.device) - before)
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    contest.run(name)
    return resident("VmHWM") - before


def resident(kind: str) -> int:
    (line,) = (line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def engine_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["clients", "batch", "loop s", "loop / many", "many / floor", "many / our floor"]
    columns += ["CPU time: loop / many", "many / floor", "many / our floor"]
    columns += ["memory: many / loop", "farthest from loop", "rounding", "by SGD"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        wall, cpu, peak = row["wall_seconds"], row["cpu_seconds"], row["peak_bytes"]
        ratios = [
            ratio for spent in (wall, cpu) for ratio in (spent["loop"] / spent["many"], *(spent["many"] / spent[name] for name in FLOORS))
        ]
        cells = [row["clients"], row["batch"], f"{wall['loop']:.2f}", *(f"{ratio:.2f}" for ratio in ratios)]
        cells += [f"{peak['many'] / max(1, peak['loop']):.2f}" if peak else "", f"{row['farthest']:.1e}"]
        cells += ["" if row[key] is None else f"{row[key]:.1e}" for key in ("rounding", "by_sgd")]
        print("| " + " | ".join(map(str, cells)) + " |")


def whole_table(rows: Sequence[dict[str, Any]]) -> None:
    columns = ["clients", "rounds x steps", "contestant", "wall s", "CPU s", "last round s", "memory MB", "accuracy", "farthest"]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        for name, spent in row["whole"].items():
            cells = [row["clients"], f"{row['rounds']} x {row['steps']}", name, f"{spent['wall_seconds']:.1f}"]
            cells += [f"{spent['cpu_seconds']:.1f}", f"{row['round_seconds'][name][-1]:.1f}", f"{spent['peak_bytes'] / 1e6:.0f}"]
            cells += [f"{row['accuracy'][name]:.3f}", f"{row['farthest'][name]:.1e}" if name in row["farthest"] else ""]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
