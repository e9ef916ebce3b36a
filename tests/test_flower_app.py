"""The project as a Flower app: its two halves under a grid of ClientApps, and `flwr run` on stock processes."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file
from test_flower import AppGrid

from fedpeft import Config, RunStopped, UserError, simulate
from fedpeft.addresses import LOOPBACK, free_port
from fedpeft.arrays import digest

APP = pathlib.Path(__file__).parent.parent / "flower-app"
ADAPTER = "adapter/adapter_model.safetensors"


class Apps(AppGrid):
    """The ClientApp at nodes with contexts of their own, as SuperNodes have."""

    def __init__(self, partitions):
        from fedpeft.simulations.flower_app import client

        super().__init__(client)
        self.contexts = {100 + n: Context(1, 100 + n, given, RecordDict(), {}) for n, given in enumerate(partitions)}

    def get_node_ids(self):
        return list(self.contexts)

    def context(self, node):
        return self.contexts[node]


@pytest.fixture
def config(tiny_settings, tmp_path):
    def write(**sections):
        settings = {**tiny_settings, "partition": {"name": "iid", "clients": 3}}
        for name, section in sections.items():
            settings[name] = {**settings.get(name, {}), **section} if isinstance(section, dict) else section
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def play(path, tmp_path, partitions=range(3)):
    from fedpeft.simulations.flower_app import server

    grid = Apps([{"partition-id": n} if n is not None else {} for n in partitions])
    given = {"config": str(path), "overrides": "seed=1 strategy.num_rounds=2", "out": str(tmp_path / "app")}
    server(grid=grid, context=Context(1, 1, {}, RecordDict(), given))
    return tmp_path / "app"


@pytest.mark.parametrize("strategy", ["fedavg", "fedsmooth_lora", "fed_svd"])
def test_the_app_ends_at_the_bits_of_simulate(strategy, config, tmp_path):
    path = config(strategy={"name": strategy})
    simulated = simulate(Config.load(path, ["seed=1", "strategy.num_rounds=2"]), tmp_path / "simulated")
    out = play(path, tmp_path, [2, 0, 1])
    assert digest(load_file(out / ADAPTER)) == digest(load_file(simulated.folder / ADAPTER))
    assert json.loads((out / "summary.json").read_text())["metrics"] == simulated.summary["metrics"]
    assert (out / "partition.png").is_file()


def test_nodes_that_cannot_take_part_say_why(config, tmp_path, capsys):
    with pytest.raises(RunStopped, match=r"2 of the 3 clients of the partition are there after 0 s; start a SuperNode for each"):
        play(config(strategy={"round_timeout": 0.1}), tmp_path, [0, 1, 1, 7, None])
    said = capsys.readouterr().out
    assert "another has its partition-id, 1" in said
    assert "partition-id 7 is none of the 3 clients" in said
    assert "this SuperNode has no 'partition-id'" in said


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"strategy": {"name": "fedsa_lora"}}, "leaves a part of every model at its client"),
        ({"privacy": {"target_epsilon": 3.0}}, "a ledger must outlive a SuperNode"),
    ],
)
def test_what_needs_more_than_the_app_has_is_refused(section, said, config, tmp_path):
    with pytest.raises(UserError, match=said):
        play(config(**section), tmp_path)
    assert not (tmp_path / "app").exists()


@pytest.mark.slow
def test_flwr_run_on_stock_processes(config, tmp_path):
    """Flower's own SuperLink, SuperNodes and command, insecure on loopback: the same adapter."""
    path = config()
    simulated = simulate(Config.load(path, ["strategy.num_rounds=1"]), tmp_path / "simulated")
    fleet, control = free_port(), free_port()
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "FLWR_HOME": str(tmp_path / "home")}
    environment["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{environment['PATH']}"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(f'[superlink.lab]\naddress = "{LOOPBACK}:{control}"\ninsecure = true\n')
    link = ["flower-superlink", "--insecure", "--host", LOOPBACK, "--port", str(control), "--fleet-api-address", f"{LOOPBACK}:{fleet}"]
    running = [started(link, environment, tmp_path / "superlink.log")]
    try:
        for n in range(3):
            node = ["flower-supernode", "--insecure", "--superlink", f"{LOOPBACK}:{fleet}", "--host", LOOPBACK, "--port", str(free_port())]
            node += ["--node-config", f"partition-id={n} num-partitions=3"]
            running.append(started(node, {**environment, "FLWR_HOME": str(tmp_path / f"home-{n}")}, tmp_path / f"node-{n}.log"))
        given = f'config="{path}" overrides="strategy.num_rounds=1" out="{tmp_path / "app"}"'
        command = ["flwr", "run", str(APP), "lab", "--run-config", given]
        until(lambda: subprocess.run(command, env=environment, capture_output=True).returncode == 0, 60)
        until((tmp_path / "app" / "summary.json").is_file, 400, tmp_path / "superlink.log")
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
    assert digest(load_file(tmp_path / "app" / ADAPTER)) == digest(load_file(simulated.folder / ADAPTER))


def started(command, environment, log):
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def until(holds, seconds, log=None):
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, log.read_text()[-5000:] if log else "it did not come"
        time.sleep(1)
