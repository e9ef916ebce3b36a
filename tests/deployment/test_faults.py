"""The fault matrix: real processes, real kills. What can come back goes on, and the run ends as if nothing had happened."""

import functools
import os
import pathlib
import shutil
import signal
import time

import pytest
import yaml
from flwr.proto.control_pb2 import ListRunsRequest, StopRunRequest
from safetensors.numpy import load_file

from fedpeft import Config, simulate
from fedpeft.addresses import LOOPBACK, free_port
from fedpeft.arrays import digest
from fedpeft.flower_link import Link
from fedpeft.health import ask
from fedpeft.keys import make

from .conftest import NAMES, Proxy, superlink_of, wait_until

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


def test_an_answer_for_a_run_that_is_gone_keeps_nobody_from_the_next(three, deploy):
    """Another run at the same address, of which Flower's new SuperLink knows nothing that was before."""
    deployment = deploy(three)
    first = [deployment.server(), deployment.client("anna"), deployment.client("ben")]
    carla = deployment.client("carla", dying=("before-sending:2",))
    wait_until(lambda: carla.popen.poll() is not None, 90, lambda: carla.said)
    for process in first:
        process.kill()
    deployment.run = deployment.folder / "another"
    server, clients = deployment.server(), [deployment.client(name) for name in NAMES]
    assert server.end(200) == 0, server.said
    assert [client.end(30) for client in clients] == [0, 0, 0], [client.said for client in clients]
    assert "belongs to another run, and is dropped" in clients[2].said
    assert all(line["accepted"] == 3 for line in deployment.rounds()[1:])


MORE_DEATHS = {"anna": ("after-sending:1",), "ben": ("receiving:2",), "carla": ("uploading:3",), "server": ("waiting:1", "checkpoint:3")}


@pytest.mark.slow
def test_a_message_that_was_lost_with_its_reader_is_sent_again(stateful, deploy, tmp_path):
    simulate(Config.from_dict(stateful), tmp_path / "simulated")
    deployment = play(deploy(stateful), MORE_DEATHS)
    assert_nothing_happened(deployment, tmp_path / "simulated")


@pytest.mark.slow
def test_a_client_that_lost_its_memory_is_sent_everything_again(stateful, deploy):
    """Strategies that merge send each merge once: who lost them says so, and the next round brings them all."""
    deployment = deploy({**stateful, "strategy": {**stateful["strategy"], "num_rounds": 6}})
    server = deployment.server()
    clients = [deployment.client(name) for name in NAMES]
    deployment.wait_for_round(2)
    clients[2].popen.send_signal(signal.SIGINT)
    assert clients[2].end(60) == 0
    shutil.rmtree(deployment.keys / "carla" / "state")
    clients[2] = deployment.client("carla")
    assert server.end(200) == 0, server.said
    assert [client.end(30) for client in clients] == [0, 0, 0]
    rounds = deployment.rounds()
    (lost,) = [line for line in rounds if "2" in line["rejected_clients"]]
    assert lost["rejected_clients"]["2"].startswith("other seed, library or history")
    assert all(line["accepted"] == 3 for line in rounds[lost["round"] + 1 :])
    assert lost["round"] < 6


@pytest.mark.slow
def test_a_cut_network_and_a_killed_superlink_cost_nothing(three, deploy, tmp_path):
    settings = {**three, "strategy": {**three["strategy"], "num_rounds": 8, "round_timeout": 120}}
    simulate(Config.from_dict(settings), tmp_path / "simulated")
    deployment = deploy(settings)
    proxy = Proxy(deployment.port)
    server = deployment.server()
    clients = [deployment.client(name) for name in NAMES[:2]] + [deployment.client("carla", port=proxy.port)]
    deployment.wait_for_round(1)
    proxy.stalled = True
    time.sleep(2)
    proxy.cut()
    time.sleep(4)
    proxy.heal()
    deployment.wait_for_round(3)
    os.kill(superlink_of(server), signal.SIGKILL)
    assert server.end(200) == 0, server.said
    assert [client.end(30) for client in clients] == [0, 0, 0], [client.said for client in clients]
    proxy.close()
    assert "the SuperLink ended" in server.said
    assert "is lost; trying again" in clients[2].said
    assert_nothing_happened(deployment, tmp_path / "simulated")


@pytest.mark.slow
def test_a_full_disk_stops_the_server_with_a_reason_and_resume_goes_on(stateful, deploy, tmp_path):
    simulate(Config.from_dict(stateful), tmp_path / "simulated")
    deployment = deploy(stateful)
    server = deployment.server(dying=["full-checkpoint:2"])
    clients = [deployment.client(name) for name in NAMES]
    assert server.end(200) == 1
    assert "round 2 cannot be written" in server.said and "No space left on device" in server.said and "--resume" in server.said
    again = deployment.resume()
    assert again.end(200) == 0, again.said
    assert [client.end(30) for client in clients] == [0, 0, 0]
    assert_nothing_happened(deployment, tmp_path / "simulated")


@pytest.mark.slow
def test_a_client_that_is_too_slow_misses_its_rounds_and_comes_back(three, deploy):
    deployment = deploy({**three, "strategy": {**three["strategy"], "num_rounds": 6, "round_timeout": 5}})
    clients = [deployment.client("anna"), deployment.client("ben"), deployment.client("carla", dying=["slow-training:2"])]
    server = deployment.server()
    assert server.end(200) == 0, server.said
    assert [client.end(30) for client in clients] == [0, 0, 0]
    rounds = deployment.rounds()
    assert rounds[2]["rejected_clients"] == {"2": "no answer in time"}
    assert rounds[2]["accepted"] == 2
    assert rounds[-1]["accepted"] == 3, rounds[-1]
    assert [line["round"] for line in rounds] == list(range(7))


@pytest.mark.slow
def test_a_client_that_stays_away_costs_its_own_update(three, deploy, monkeypatch):
    monkeypatch.setenv("HEARTBEAT_SECONDS", "10")  # the sooner it is missed
    deployment = deploy({**three, "strategy": {**three["strategy"], "min_available_nodes": 2, "round_timeout": 100}})
    clients = {name: deployment.client(name, dying=["training:2"] if name == "ben" else ["none"]) for name in NAMES}
    server = deployment.server()
    assert server.end(250) == 0, server.said
    assert [clients[name].end(30) for name in ("anna", "carla")] == [0, 0]
    assert clients["ben"].end(1) == -signal.SIGKILL
    rounds = deployment.rounds()
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    assert rounds[2]["rejected_clients"]["1"].startswith("client failed: Error: Node Unavailable")
    assert rounds[2]["accepted"] == rounds[2]["asked"] - 1
    assert not rounds[3]["rejected"]
    assert "ben (client 1) has gone" in server.said


@pytest.mark.slow
def test_strangers_are_refused_with_one_line(three, deploy, tmp_path):
    deployment = deploy(three)
    make(deployment.keys, ["localhost"], ["dora", "emil"])
    file = deployment.keys / "clients.yaml"
    entries = yaml.safe_load(file.read_text())
    entries["dora"]["revoked"] = True
    del entries["emil"]
    file.write_text(yaml.safe_dump(entries))
    make(tmp_path / "other", ["localhost"], ["anna"])
    for name in ("dora", "emil"):
        (deployment.folder / f"{name}.yaml").write_text((deployment.folder / "anna.yaml").read_text())
    server = deployment.server()
    server.wait_for("waiting at", 90)
    strangers = {name: deployment.client(name) for name in ("dora", "emil")}
    where = ["--server", f"{LOOPBACK}:{deployment.port}", "--data", deployment.folder / "anna.yaml"]
    strangers["other authority"] = deployment.start("other", "client", *where, "--keys", tmp_path / "other" / "anna")
    strangers["no encryption"] = deployment.start("plain", "client", *where, "--keys", deployment.keys / "anna", "--insecure")
    for name, stranger in strangers.items():
        if name == "no encryption":  # to it a server that speaks TLS is no server
            stranger.wait_for("INSECURE", 60)
            continue
        assert stranger.end(90) == 2, (name, stranger.said)
        (line,) = [line for line in stranger.said.splitlines() if line.startswith("fedpeft:")]
        assert "refuses this client" in line
        assert "Traceback" not in stranger.said
    assert "takes part" not in server.said


@pytest.mark.slow
def test_without_encryption_it_says_so_and_runs(three, deploy, tmp_path):
    simulate(Config.from_dict(three), tmp_path / "simulated")
    deployment = deploy(three)
    server = deployment.server("--insecure")
    clients = [deployment.client(name, "--insecure") for name in NAMES]
    assert server.end(200) == 0, server.said
    assert [client.end(30) for client in clients] == [0, 0, 0]
    assert all("INSECURE" in process.said for process in deployment.processes)
    assert_nothing_happened(deployment, tmp_path / "simulated")


@pytest.mark.slow
def test_ctrl_c_ends_both_sides_in_order(three, deploy):
    deployment = deploy({**three, "strategy": {**three["strategy"], "num_rounds": 90}})
    health = free_port()
    server = deployment.server("--health", f"{LOOPBACK}:{health}")
    clients = [deployment.client(name) for name in NAMES]
    deployment.wait_for_round(2)
    state = ask(f"{LOOPBACK}:{health}")
    assert state["clients"] == list(NAMES) and state["rounds_completed"] >= 2
    clients[0].popen.send_signal(signal.SIGINT)
    assert clients[0].end(30) == 0
    assert "stopping after what is being done" in clients[0].said
    superlink = superlink_of(server)
    server.popen.send_signal(signal.SIGTERM)
    assert server.end(30) == 130
    assert "--resume" in server.said and "Traceback" not in server.said
    assert not pathlib.Path(f"/proc/{superlink}").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_in_flower_goes_on_after_its_last_whole_round(three, deploy, tmp_path):
    """As with `flwr stop`, which whoever can run programs on the server's machine can do."""
    settings = {**three, "strategy": {**three["strategy"], "num_rounds": 6}}
    simulate(Config.from_dict(settings), tmp_path / "simulated")
    deployment = deploy(settings)
    server = deployment.server()
    clients = [deployment.client(name) for name in NAMES]
    deployment.wait_for_round(2)
    words = pathlib.Path(f"/proc/{superlink_of(server)}/cmdline").read_text().split("\0")
    link = Link(f"{LOOPBACK}:{words[words.index('--port') + 1]}", (deployment.keys / "ca.crt").read_bytes())
    (run_id,) = link._control.ListRuns(ListRunsRequest()).run_dict
    link._control.StopRun(StopRunRequest(run_id=run_id))
    assert server.end(200) == 0, server.said
    assert [client.end(30) for client in clients] == [0, 0, 0]
    assert "going on after the last whole round" in server.said
    assert_nothing_happened(deployment, tmp_path / "simulated")
