"""The fault matrix: real processes, real kills. What can come back goes on, and the run ends as if nothing had happened."""

import functools
import signal
import time

import pytest
from safetensors.numpy import load_file

from fedpeft import Config, simulate
from fedpeft.arrays import digest

from .conftest import NAMES

ADAPTER = "adapter/adapter_model.safetensors"


def play(deployment, deaths, seconds=300):
    """Run server and clients to the end, each started again whenever it was killed; `deaths`: name -> its moments."""
    lives = {"server": deployment.server} | {name: functools.partial(deployment.client, name) for name in NAMES}
    running = {name: start(dying=deaths.get(name, ("none",))) for name, start in lives.items()}
    ends = time.monotonic() + seconds
    while any(process.popen.poll() is None for process in running.values()):
        for name, process in running.items():
            if process.popen.poll() == -signal.SIGKILL:
                again = deployment.resume if name == "server" else lives[name]
                running[name] = again(dying=deaths.get(name, ("none",)))
        if running["server"].popen.poll() is not None:
            ends = min(ends, time.monotonic() + 30)
        assert time.monotonic() < ends, "\n\n".join(process.log.name + ":\n" + process.said for process in deployment.processes)
        time.sleep(0.1)
    for process in running.values():
        assert process.popen.returncode == 0, process.said
    for name, moments in deaths.items():
        assert len(list(deployment.died(name).iterdir())) == len(moments), (name, moments)
    return deployment


def assert_nothing_happened(deployment, simulated):
    """Every round once, every client in every round, and the same bits."""
    lines = deployment.rounds()
    assert [line["round"] for line in lines] == list(range(len(lines)))
    assert all(line["asked"] == line["accepted"] == 3 and not line["rejected"] for line in lines[1:]), lines
    assert digest(load_file(deployment.run / ADAPTER)) == digest(load_file(simulated / ADAPTER))


@pytest.fixture
def stateful(three):
    return {**three, "strategy": {**three["strategy"], "name": "fedsmooth_lora", "round_timeout": 120}}


DEATHS = {
    "anna": ("training:1", "uploading:2"),
    "ben": ("before-sending:2", "receiving:0"),
    "carla": ("after-sending:2", "training:3"),
    "server": ("asking:2", "checkpoint:2", "aggregating:3"),
}


def test_everybody_dies_and_nothing_happened(stateful, deploy, tmp_path):
    simulate(Config.from_dict(stateful), tmp_path / "simulated")
    deployment = play(deploy(stateful), DEATHS)
    assert_nothing_happened(deployment, tmp_path / "simulated")
