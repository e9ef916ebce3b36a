"""Clients in Ray's actors: the numbers of a run in one process, also when an actor is killed, and nothing left behind."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from fedpeft import Config, UserError, arrays, flower_private, simulate, wire
from fedpeft.cli import main
from fedpeft.records import Assignment
from fedpeft.simulations import ray_grid
from fedpeft.simulations.assemble import assemble
from fedpeft.simulations.ray_grid import ATTEMPTS, Cohort, RayGrid, _shares


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs of Ray, started once; a run that finds Ray in its process joins it."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="WARNING", configure_logging=False)
    yield ray
    ray.shutdown()


def played(settings, out):
    run = simulate(Config.from_dict(settings), out)
    return run.arrays, [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def on_ray(settings, **keys):
    return {**settings, "simulation": {"engine": "ray", "actors": 2, **keys}}


def test_private_clients_whose_actor_is_killed_end_at_the_same_bits(cluster, tiny_settings, tmp_path, monkeypatch):
    """One of two actors dies in round 2: its clients are asked again, and what they may have released is charged again."""
    settings = {**tiny_settings, "privacy": {"noise_multiplier": 1.0, "insecure_seed": 3}}
    alone, before = played(settings, tmp_path / "alone")
    enter, push, lost, pids = RayGrid.__enter__, RayGrid.push_messages, RayGrid._lost, []

    def entering(self):
        grid = enter(self)
        pids.extend(cluster.get([actor.__ray_call__.remote(lambda actor: os.getpid()) for actor in self._actors]))
        return grid

    def pushing(self, messages):
        ids = push(self, messages)
        if wire.message_to_assignment(messages[0])[0].round == 2 and pids:
            os.kill(pids.pop(), signal.SIGKILL)
            pids.clear()
        return ids

    again = []

    def losing(self, cohort, reason):
        again.extend(assignment.client for assignment in cohort.assignments)
        lost(self, cohort, reason)

    monkeypatch.setattr(RayGrid, "__enter__", entering)
    monkeypatch.setattr(RayGrid, "push_messages", pushing)
    monkeypatch.setattr(RayGrid, "_lost", losing)
    spread, after = played(on_ray(settings), tmp_path / "spread")
    assert arrays.digest(spread) == arrays.digest(alone)
    assert 0 < len(again) < 4, "the other actor's clients are not asked again"
    for one, other in zip(before, after, strict=True):
        assert (one["accepted"], one["loss"], one["client_update_norms"]) == (
            other["accepted"],
            other["loss"],
            other["client_update_norms"],
        )
    charged = {client: (tmp_path / "spread" / "ledger" / f"client-{client}.jsonl").read_text().count("\n") for client in range(4)}
    assert charged == {client: 4 if client in again else 3 for client in range(4)}


def test_engine_many_and_clients_that_remember_agree_to_rounding(cluster, tiny_settings, tmp_path):
    settings = {**tiny_settings, "strategy": {"name": "fedsa_lora", "num_rounds": 3}}
    settings["training"] = {**settings["training"], "engine": "many", "head_init": "class_statistics"}
    settings["data"] = {**settings["data"], "validation_fraction": 0.2}
    alone, before = played(settings, tmp_path / "alone")
    spread, after = played(on_ray(settings), tmp_path / "spread")
    assert alone.keys() == spread.keys()
    assert max(float(np.abs(alone[name] - spread[name]).max()) for name in alone) < 1e-5
    assert [line["report"].keys() for line in before] == [line["report"].keys() for line in after]
    mine = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone" / "personal").rglob("*.safetensors"))
    assert len(mine) == 4, "every client's own part has come home"
    assert mine == sorted(path.relative_to(tmp_path / "spread") for path in (tmp_path / "spread" / "personal").rglob("*.safetensors"))


def test_more_actors_than_there_is_room_for_are_refused_before_a_run_folder_is_made(cluster, tiny_settings, tmp_path):
    with pytest.raises(UserError, match=r"simulation.actors: 64 actors with 1 CPUs each, and Ray has 2; allowed: at most 2"):
        played(on_ray(tiny_settings, actors=64), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_address_where_no_ray_is_is_refused_at_once(tiny_settings, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(UserError, match=f"simulation.address: no Ray cluster answers at {address}"):
            played(on_ray(tiny_settings, address=address), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [
        ({}, {"CPU": 2.0}, (2, 1.0, 0.0)),
        ({"cpus_per_actor": 2.0}, {"CPU": 16.0}, (8, 2.0, 0.0)),
        ({}, {"CPU": 16.0, "GPU": 4.0}, (4, 1.0, 1.0)),
        ({"actors": 8}, {"CPU": 16.0, "GPU": 4.0}, (8, 1.0, 0.5)),
        ({"actors": 2}, {"CPU": 16.0, "GPU": 4.0}, (2, 1.0, 1.0)),
        ({"cpus_per_actor": 4.0}, {"CPU": 2.0}, "simulation.actors"),
        ({"actors": 2, "gpus_per_actor": 1.0}, {"CPU": 16.0, "GPU": 1.0}, "simulation.gpus_per_actor"),
        ({"gpus_per_actor": 1.0}, {"CPU": 16.0}, "simulation.gpus_per_actor"),
    ],
)
def test_what_each_actor_gets(asked, there, expected):
    section = Config.from_dict({"simulation": {"engine": "ray", **asked}}).simulation
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            _shares(section, there)
    else:
        assert _shares(section, there) == expected


def test_a_cohort_that_no_actor_survives_fails_with_the_reason(tiny_config):
    parts = assemble(tiny_config)
    grid = RayGrid(parts.worker)
    made = []
    grid._make, grid._settings = lambda settings: made.append(settings) or "an actor", "settings"
    asked = [Assignment("train", 1, client, parts.adapted.read()) for client in (1, 2)]
    messages = [flower_private.stamp(wire.assignment_to_message(one, grid.worker.base, grid.roster[one.client])) for one in asked]
    cohort = Cohort(messages, asked)
    for _ in range(ATTEMPTS):
        assert not grid._replies
        grid._lost(cohort, "killed")
    assert len(made) == ATTEMPTS, "another actor takes the place of each"
    grid._actors.clear()
    replies = grid.pull_messages([message.metadata.message_id for message in messages])
    assert [reply.error.reason for reply in replies] == [f"{ATTEMPTS} actors died over its cohort, the last: killed"] * 2


def test_a_missing_ray_is_one_line_before_anything_is_loaded(tiny_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_grid.importlib.util, "find_spec", lambda name: None)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(on_ray(tiny_settings)))
    assert main(["simulate", str(config), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith('fedpeft: simulation.engine: "ray" is asked for, and Ray is not installed') and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def of_session(session):
    """The processes of a session, by their ids."""
    found = []
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environ = (place / "environ").read_bytes()
        except OSError:
            continue
        if f"FEDPEFT_TEST_SESSION={session}".encode() in environ:
            found.append(int(place.name))
    return found


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_behind(tiny_settings, tmp_path):
    """Ray is started by the run itself here."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(on_ray({**tiny_settings, "strategy": {"num_rounds": 500}})))
    session = f"{os.getpid()}-{time.time()}"
    command = [sys.executable, "-m", "fedpeft", "simulate", str(config), "--out", str(tmp_path / "run"), "--json"]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "FEDPEFT_TEST_SESSION": session}
    )
    for line in run.stdout:
        event = json.loads(line)
        if event["event"] == "round" and event["round"] == 2:
            assert len(of_session(session)) > 4, "Ray's processes are seen"
            run.send_signal(signal.SIGINT)
            break
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while of_session(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not of_session(session)
