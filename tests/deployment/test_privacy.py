"""Privacy over real processes: the server's own noise is that of the simulation."""

import pytest
from safetensors.numpy import load_file

from fedpeft import Config, simulate
from fedpeft.arrays import digest
from fedpeft.privacy.ledger import Ledger

from .conftest import NAMES

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.mark.slow
def test_whole_clients_are_private_in_a_deployment_by_the_same_code(three, deploy, tmp_path):
    """Seeded, so that coins and noise can be compared: whom the server asks, what it adds, and where the clipping norm goes."""
    privacy = {"unit": "client", "noise_multiplier": 1.0, "amplification": True, "target_quantile": 0.5, "insecure_seed": 5}
    settings = {**three, "strategy": {**three["strategy"], "fraction_train": 0.6}, "privacy": privacy}
    simulated = simulate(Config.from_dict(settings), tmp_path / "simulated")
    deployment = deploy(settings)
    server = deployment.server()
    clients = [deployment.client(name) for name in NAMES]
    assert server.end() == 0, server.said
    assert [client.end(20) for client in clients] == [0, 0, 0], [client.said for client in clients]
    assert digest(load_file(deployment.run / ADAPTER)) == digest(load_file(tmp_path / "simulated" / ADAPTER))
    there, here = deployment.summary()["privacy"], simulated.summary["privacy"]
    assert there["epsilon_if_noise_were_secret"] == pytest.approx(here["epsilon_if_noise_were_secret"])
    assert Ledger(deployment.run / "ledger" / "server.jsonl").history == Ledger(tmp_path / "simulated" / "ledger" / "server.jsonl").history
    assert all(line["loss"] is None for line in deployment.rounds()[1:])
