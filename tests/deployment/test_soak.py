"""`make soak`: kills at random moments, hour after hour if wanted (SOAK_KILLS, 100 by default; SOAK_SEED). No run may be lost."""

import functools
import os
import random
import signal
import time

import pytest
from safetensors.numpy import load_file

from fedpeft import Config, simulate
from fedpeft.arrays import digest

from .conftest import NAMES, superlink_of

ROUNDS = 12


@pytest.mark.soak
def test_no_run_is_lost(three, deploy, tmp_path):
    chance, wanted, killed, played = random.Random(int(os.environ.get("SOAK_SEED", "0"))), int(os.environ.get("SOAK_KILLS", "100")), 0, 0
    strategy = {**three["strategy"], "name": "fedsmooth_lora", "num_rounds": ROUNDS, "round_timeout": 120}
    settings = {**three, "strategy": strategy}
    simulate(Config.from_dict(settings), tmp_path / "simulated")
    while killed < wanted:
        played += 1
        killed += play(deploy(settings, f"run{played}"), chance, wanted - killed, tmp_path / "simulated")
        print(f"{killed} kills in {played} runs", flush=True)


def play(deployment, chance, kills, simulated):
    """One run with at most so many kills; how many there were."""
    lives = {"server": deployment.server} | {name: functools.partial(deployment.client, name) for name in NAMES}
    running = {name: start() for name, start in lives.items()}
    killed, whole, over, ends = 0, 0, 0.0, time.monotonic() + 1800
    while any(process.popen.poll() is None for process in running.values()):
        assert time.monotonic() < ends, [process.said for process in running.values()]
        time.sleep(chance.uniform(0, 6))
        for name, process in running.items():
            if process.popen.poll() not in (None, 0):  # killed, or ended since its SuperLink was: as a supervisor would
                running[name] = deployment.resume() if name == "server" and (deployment.run / "config.yaml").exists() else lives[name]()
        alive = [name for name, process in running.items() if process.popen.poll() is None]
        if killed < kills and running["server"].popen.poll() is None and alive:
            victim = chance.choice([*alive, "superlink"])
            try:
                if victim == "superlink":
                    os.kill(superlink_of(running["server"]), signal.SIGKILL)
                else:
                    running[victim].kill()
                killed += 1
            except (OSError, IndexError):
                continue  # it was not there yet, or not any more
        if running["server"].popen.poll() == 0 and not over:
            over = time.monotonic() + 30
        if over and time.monotonic() > over:  # killed before they heard the last word: nobody is there to tell them
            break
    deployment.close()
    assert running["server"].popen.returncode == 0, running["server"].said
    for name, process in running.items():
        assert "Traceback" not in process.said, (name, process.said)
    lines = deployment.rounds()
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1)), "no round lost, none twice"
    for line in lines[1:]:
        assert line["accepted"] + sum(line["rejected"].values()) == line["asked"]
        whole += line["accepted"] == 3
    if whole == ROUNDS:
        adapter = "adapter/adapter_model.safetensors"
        assert digest(load_file(deployment.run / adapter)) == digest(load_file(simulated / adapter))
    print(f"{killed} kills, {whole} of {ROUNDS} rounds with every client")
    return killed
