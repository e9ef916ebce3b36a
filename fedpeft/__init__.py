"""fedpeft: federated fine-tuning of Hugging Face models with LoRA-family adapters.

The path of one update, from a client's data to the adapter file:

     1. cli.py -> config.py            YAML and overrides become a checked `Config`; names are looked up in lookup.py
     2. simulations/run.py             `simulate`: a config to a run folder
     3. simulations/assemble.py        loads what follows, and finds every problem of the input first
        data/corpus.py                   rows of a source become `Examples`, with a test part for the server
        data/partitions/                 which client holds which rows
        base.py                          the frozen base model and its tokenizer
        adapters/                        the PEFT adapter on it, read and written as plain arrays
        tasks/                           how examples become tensors, what the loss is, what is measured
     4. server/rounds.py               THE round loop:
        a. server/sampling.py            who takes part
        b. server/asking.py              what each is sent: an `Assignment`, which wire.py makes a Flower message
        c. server/exchange.py            out through a Flower `Grid` and back; simulations/grid.py is the grid of this process
        d. client/worker.py              a client answers, on the data of client/node.py -> `Update`:
           strategies/<name>.py            `begin`, `drift`: what training starts from (gradients of training/gradients.py, its memory)
           training/one.py                 trains
           strategies/<name>.py            `end`: what is uploaded and remembered; `answer`, where a strategy asks twice
        e. server/validation.py          every check on an arriving update; one bad client costs one update, not the round
        f. strategies/<name>.py          `combine`: many updates to one, on products.py; `apply`: the server's step
        g. training/evaluate.py          on the server's test part
        h. server/run_folder.py          one line in rounds.jsonl
           server/checkpoint.py          what --resume needs
     5. server/ending.py               adapter/ (a plain PEFT folder), summary.json, pictures, report

With real clients the same loop runs in server/deployment.py, over the grid of flower_link.py; server/superlink.py is the process
they connect to, server/roster.py says who is there. client/participation.py is a client's life, client/resident.py holds its worker.

A study (simulations/study.py) is many such runs: arms x seeds, resumable, with tables and a picture.

Records that travel are in records.py, errors in errors.py, every generator in seeds.py. Imports run downwards only:
foundations, then config, wire, strategies and data, then base, adapters, tasks and training, then client and server,
then simulations, then cli.

    >>> from fedpeft import Config
    >>> Config.load(overrides=["strategy.num_rounds=5"]).strategy.num_rounds
    5
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.config import Config as Config
    from fedpeft.errors import FedpeftError as FedpeftError
    from fedpeft.errors import RunStopped as RunStopped
    from fedpeft.errors import UserError as UserError
    from fedpeft.simulations.run import RunResult as RunResult
    from fedpeft.simulations.run import simulate as simulate

_HOMES = {
    "Config": "fedpeft.config",
    "FedpeftError": "fedpeft.errors",
    "RunResult": "fedpeft.simulations.run",
    "RunStopped": "fedpeft.errors",
    "UserError": "fedpeft.errors",
    "simulate": "fedpeft.simulations.run",
}

__all__ = ["Config", "FedpeftError", "RunResult", "RunStopped", "UserError", "simulate"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import fedpeft` loads neither torch nor Flower."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedpeft' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
