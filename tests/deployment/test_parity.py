"""Deployment equals simulation: real processes over TLS and node keys end at the bits of the in-process run."""

import json

import numpy as np
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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedavg", "ffa_lora", "lora_fair", "fedsmooth_lora"])
def test_a_deployment_of_engine_many_ends_where_the_simulation_does(strategy, three, deploy, tmp_path):
    """One client a process there, all of a cohort in one pass here: the same but for rounding, which AdamW would blow up where
    a gradient is next to zero (FedSmoothLoRA: 1.3e-5 after six steps)."""
    settings = {**three, "strategy": {**three["strategy"], "name": strategy}}
    settings["training"] = {**settings["training"], "engine": "many", "optimizer": "sgd", "learning_rate": 0.1}
    simulate(Config.from_dict(settings), tmp_path / "simulated")
    deployment = deploy(settings)
    server = deployment.server()
    clients = [deployment.client(name) for name in NAMES]
    assert server.end() == 0, server.said
    assert [client.end(20) for client in clients] == [0, 0, 0], [client.said for client in clients]
    lines = [json.loads(line) for line in (tmp_path / "simulated" / "rounds.jsonl").read_text().splitlines()]
    assert not any("clients_fell_back" in line["report"] for line in [*lines, *deployment.rounds()])
    left, right = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (deployment.run, tmp_path / "simulated"))
    assert left.keys() == right.keys()
    pairs = [name for name in left if name.endswith("lora_A.weight")]
    for name in left.keys() - {name for A in pairs for name in (A, A.replace("lora_A", "lora_B"))}:
        np.testing.assert_allclose(left[name], right[name], atol=1e-5, err_msg=name)
    for A in pairs:  # of factors that the export has refactored only the product is determined
        B = A.replace("lora_A", "lora_B")
        np.testing.assert_allclose(left[B] @ left[A], right[B] @ right[A], atol=1e-5, err_msg=A)
