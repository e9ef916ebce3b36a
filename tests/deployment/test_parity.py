"""Deployment equals simulation: real processes over TLS and node keys end at the bits of the in-process run."""

import json

import pytest
from safetensors.numpy import load_file

from fedpeft import Config, simulate
from fedpeft.arrays import digest

from .conftest import NAMES

STRATEGIES = ["fedavg", "fedsmooth_lora", "ffa_lora", "lora_fair"]
SLOW = {"ffa_lora", "lora_fair", "fedsmooth_lora"}  # the last ends at the same bits in test_faults.py too


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in STRATEGIES])
def test_a_deployment_ends_at_the_bits_of_the_simulation(strategy, three, deploy, tmp_path):
    settings = {**three, "strategy": {**three["strategy"], "name": strategy}}
    settings["training"] = {**settings["training"], "head_init": "class_statistics"}
    simulated = simulate(Config.from_dict(settings), tmp_path / "simulated")
    deployment = deploy(settings)
    server = deployment.server()
    clients = [deployment.client(name) for name in NAMES]
    assert server.end() == 0, server.said
    assert [client.end(20) for client in clients] == [0, 0, 0], [client.said for client in clients]
    adapter = "adapter/adapter_model.safetensors"
    assert digest(load_file(deployment.run / adapter)) == digest(load_file(tmp_path / "simulated" / adapter))
    lines = [json.loads(line) for line in (tmp_path / "simulated" / "rounds.jsonl").read_text().splitlines()]
    for there, here in zip(deployment.rounds(), lines, strict=True):
        for key in ("asked", "accepted", "loss", "metrics", "examples", "update_norm", "client_update_norms"):
            assert there[key] == here[key], (there["round"], key)
    assert simulated.summary["metrics"] == deployment.summary()["metrics"]
