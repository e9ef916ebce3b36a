"""What a round of real clients costs beyond the training itself: three clients and a server on loopback, over TLS and node keys.

    python benchmarks/deployment.py [--rounds 6] [--poll 0.2]

MiniLM with a LoRA of 1 MB (r = 28). Overhead of a round: from the first message sent to the last reply checked, less the
mean of what the clients spent training by their own clocks. Beside it `--poll 3`, Flower's own interval; and the same rounds by
stock processes: `flwr run flower-app` on a SuperLink and three SuperNodes, insecure, which start a process for every message.
Memory is the largest that a client's process has held, the resident one or that of a message.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import yaml

from fedpeft import Config, environment
from fedpeft.addresses import LOOPBACK, free_port
from fedpeft.keys import make
from fedpeft.simulations.assemble import deal

RESULT = pathlib.Path(__file__).parent / "results" / "deployment.json"
NAMES = ("anna", "ben", "carla")
APP = pathlib.Path(__file__).parent.parent / "flower-app"
COMMAND = "import sys; from fedpeft import wire; wire.POLL_SECONDS = float(sys.argv.pop(1)); from fedpeft.cli import main; sys.exit(main())"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--poll", type=float, nargs="*", default=[0.2, 3.0])
    given = parser.parse_args()
    result = {f"poll {poll}": measure(given.rounds, poll) for poll in given.poll}
    result["stock processes"] = stock(given.rounds)
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
        largest = 0
        try:
            while any(process.poll() is None for process in running):
                largest = max([largest, *(held(process.pid) for process in running[1:])])
                time.sleep(0.2)
            if any(process.returncode for process in running):
                raise SystemExit("a process failed")
        finally:
            for process in running:
                process.kill()
        return found(folder / "run", largest)


def found(run: pathlib.Path, largest: int) -> dict[str, float]:
    """What a finished run says of its rounds."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()][1:]
    overhead = [line["seconds"]["exchange"] - line["report"]["clients_seconds"] for line in lines[1:]]  # round 1 warms torch up
    return {
        "overhead_seconds_median": round(statistics.median(overhead), 2),
        "overhead_seconds_worst": round(max(overhead), 2),
        "bytes_up_a_client": lines[-1]["bytes_up"] // 3,
        "client_process_mb": largest // 1024,
    }


def held(pid: int) -> int:
    """KiB that a process has held at most; 0 when it has gone."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def stock(rounds: int) -> dict[str, float]:
    """The same, of Flower's own processes."""
    with tempfile.TemporaryDirectory() as place:
        folder, fleet, control = pathlib.Path(place), free_port(), free_port()
        (folder / "config.yaml").write_text(yaml.safe_dump(settings(rounds)))
        (folder / "config.toml").write_text(f'[superlink.lab]\naddress = "{LOOPBACK}:{control}"\ninsecure = true\n')
        environment.prepare()
        link = ["flower-superlink", "--insecure", "--host", LOOPBACK, "--port", str(control), "--fleet-api-address", f"{LOOPBACK}:{fleet}"]
        running = [started(link, folder, "link")]
        for number in range(len(NAMES)):
            node = ["flower-supernode", "--insecure", "--superlink", f"{LOOPBACK}:{fleet}", "--host", LOOPBACK, "--port", str(free_port())]
            running.append(started([*node, "--node-config", f"partition-id={number}"], folder, f"node-{number}"))
        try:
            time.sleep(10)  # until the SuperLink listens
            given = f'config="{folder / "config.yaml"}" out="{folder / "run"}"'
            subprocess.run(
                [tool("flwr"), "run", str(APP), "lab", "--run-config", given], check=True, env={**os.environ, "FLWR_HOME": place}
            )
            largest, ends = 0, time.monotonic() + 900
            while not (folder / "run" / "summary.json").is_file():
                if time.monotonic() > ends:
                    raise SystemExit((folder / "link.log").read_text()[-3000:])
                largest = max([largest, *(held(pid) for pid in below(running[1:]))])
                time.sleep(0.2)
        finally:
            for process in running:
                os.killpg(process.pid, signal.SIGKILL)
        return found(folder / "run", largest)


def tool(name: str) -> str:
    return str(pathlib.Path(sys.executable).parent / name)


def started(command: list[str], folder: pathlib.Path, name: str) -> subprocess.Popen[bytes]:
    home = folder / "homes" / name
    home.mkdir(parents=True)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (folder / f"{name}.log").open("wb") as log:
        own = {**os.environ, "FLWR_HOME": str(home), "PATH": path}
        return subprocess.Popen([tool(command[0]), *command[1:]], env=own, stdout=log, stderr=log, start_new_session=True)


def below(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """The process ids in the sessions of these."""
    leaders, there = {process.pid for process in processes}, []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            there += [int(folder.name)] if session in leaders else []
    return there


if __name__ == "__main__":
    main()
