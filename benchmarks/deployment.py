"""What a round of real clients costs beyond the training itself: three clients and a server on loopback, over TLS and node keys.

    python benchmarks/deployment.py [--rounds 6] [--poll 0.2]

MiniLM with a LoRA of 1 MB (r = 28). Overhead of a round: from the first message sent to the last reply checked, less the
mean of what the clients spent training by their own clocks. Beside it `--poll 3`, Flower's own interval, and what its process for every
message costs before it trains: imports, the base and its memory, measured in a fresh process.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import yaml

from fedpeft import Config
from fedpeft.addresses import LOOPBACK, free_port
from fedpeft.keys import make
from fedpeft.simulations.assemble import deal

RESULT = pathlib.Path(__file__).parent / "results" / "deployment.json"
NAMES = ("anna", "ben", "carla")
FRESH = """
import time; t = time.perf_counter()
from fedpeft import Config
from fedpeft.training.prepare import prepare
import sys
prepare(Config.load(sys.argv[1]), 10)
print(time.perf_counter() - t)
"""
COMMAND = "import sys; from fedpeft import wire; wire.POLL_SECONDS = float(sys.argv.pop(1)); from fedpeft.cli import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--poll", type=float, nargs="*", default=[0.2, 3.0])
    given = parser.parse_args()
    result = {f"poll {poll}": measure(given.rounds, poll) for poll in given.poll}
    result["a process a message"] = fresh_process()
    versions = {name: importlib.metadata.version(name) for name in ("flwr", "grpcio", "torch", "transformers", "peft")}
    result["machine"] = {"platform": platform.platform(), "cores": os.cpu_count(), "load": os.getloadavg()[0], **versions}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def settings(rounds: int) -> dict[str, object]:
    return {
        "name": "deployment",
        "data": {"max_examples": 300},
        "partition": {"name": "iid", "clients": 3},
        "adapter": {"name": "lora", "r": 28, "target_modules": ["query", "value"]},
        "strategy": {"num_rounds": rounds, "min_available_nodes": 3},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4, "head_init": "random"},
    }


def measure(rounds: int, poll: float) -> dict[str, float]:
    """Seconds of overhead a round, of one deployment."""
    with tempfile.TemporaryDirectory() as place:
        folder, port = pathlib.Path(place), free_port()
        (folder / "config.yaml").write_text(yaml.safe_dump(settings(rounds)))
        make(folder / "keys", ["localhost"], NAMES)
        split = deal(Config.load(folder / "config.yaml"))
        for name, rows in zip(NAMES, split.partition.indices, strict=True):
            examples = split.corpus.train.take(rows)
            with (folder / f"{name}.csv").open("w", newline="") as file:
                labels = [examples.label_names[code] for code in examples.labels]
                csv.writer(file).writerows([("text", "label"), *zip(examples.columns["text"], labels, strict=True)])
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"data": {"name": str(folder / f"{name}.csv")}}))
        fedpeft = [sys.executable, "-c", COMMAND, str(poll)]
        where = ["--address", f"{LOOPBACK}:{port}", "--keys", str(folder / "keys"), "--out", str(folder / "run")]
        running = [subprocess.Popen([*fedpeft, "server", str(folder / "config.yaml"), *where])]
        for name in NAMES:
            own = ["--keys", str(folder / "keys" / name), "--data", str(folder / f"{name}.yaml")]
            running.append(subprocess.Popen([*fedpeft, "client", "--server", f"{LOOPBACK}:{port}", *own], stdout=subprocess.DEVNULL))
        try:
            if any(process.wait(900) for process in running):
                raise SystemExit("a process failed")
        finally:
            for process in running:
                process.kill()
        lines = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()][1:]
    overhead = [line["seconds"]["exchange"] - line["report"]["clients_seconds"] for line in lines[1:]]  # round 1 warms torch up
    return {
        "overhead_seconds_median": round(statistics.median(overhead), 2),
        "overhead_seconds_worst": round(max(overhead), 2),
        "bytes_up_a_client": lines[-1]["bytes_up"] // 3,
    }


def fresh_process() -> dict[str, float]:
    """What a process for every message spends before it can train."""
    with tempfile.TemporaryDirectory() as place:
        config = pathlib.Path(place) / "config.yaml"
        config.write_text(yaml.safe_dump(settings(1)))
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", FRESH, str(config)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    return {"seconds_before_training": round(seconds, 2), "memory_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024}


if __name__ == "__main__":
    main()
