"""A federation as Flower's users write it: a `ClientApp` with PEFT, Flower's own FedAvg, Flower's simulation on Ray.

    python -c "import flower_peft; flower_peft.main(FOLDER, MODE)"     started by engine.py, which has filled FOLDER

MODE is `loads`: every message loads the model, as in Flower's examples; or `cached`: an actor keeps it. A client reads its own
examples from FOLDER and trains by peft_loop.py. Writes FOLDER/MODE.npz and the seconds of the rounds, FOLDER/MODE.json.
"""

from __future__ import annotations

import functools
import json
import pathlib
import pickle
import time
from typing import Any

import numpy as np
import peft_loop
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    folder, kind, base = pathlib.Path(str(config["folder"])), str(config["kind"]), str(config["base"])
    model = (kept if config["cached"] else loaded)(kind, base, int(config["labels"]))
    mine = folder / f"client-{context.node_config['partition-id']}-round-{config['server-round']}.pickle"
    work: peft_loop.Work = pickle.loads(mine.read_bytes())
    start = message.content["arrays"].to_torch_state_dict()
    arrays = peft_loop.train(model, start, work)
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    metrics = MetricRecord({"num-examples": len(work.inputs)})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


def loaded(kind: str, base: str, labels: int) -> Any:
    torch.set_num_threads(1)  # an actor has one CPU
    model = peft_loop.model(kind, base, labels)
    peft_loop.without_dropout(model)
    return model


kept = functools.cache(loaded)


class Timed(FedAvg):
    """Flower's FedAvg, which says when a round was over."""

    ends: list[float]

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """As Flower's; a client that failed stops the benchmark."""
        replies = list(replies)
        assert not any(reply.has_error() for reply in replies), [reply.error for reply in replies if reply.has_error()][:1]
        found = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        return found


def main(folder: str, mode: str) -> None:
    place = pathlib.Path(folder)
    spec = json.loads((place / "spec.json").read_text())
    start = dict(np.load(place / "start.npz"))
    server, ends = ServerApp(), [time.perf_counter()]

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        clients = spec["clients"]
        strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        strategy.ends = ends
        told = {key: spec[key] for key in ("kind", "base", "labels")} | {"folder": str(place.absolute()), "cached": mode == "cached"}
        initial = ArrayRecord({name: Array(array) for name, array in start.items()})
        result = strategy.start(grid, initial, num_rounds=spec["rounds"], train_config=ConfigRecord(told))
        np.savez(place / f"{mode}.npz", **{name: array.numpy() for name, array in result.arrays.items()})

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=spec["clients"], backend_config=resources)
    (place / f"{mode}.json").write_text(json.dumps({"rounds": np.diff(ends).tolist()}))
