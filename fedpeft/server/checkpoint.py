"""The state of a run after a completed round, on disk so that a kill at any moment costs at most the round it fell in.

    RUN/checkpoint/round-00007/  arrays, strategy, clients (.safetensors)  state.json (with the hashes of the other files)

A checkpoint is written beside its final place and renamed: it is there as a whole or not at all. The newest that is
whole is used. No generator is stored: each is derived from (seed, purpose, round, client).
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from dataclasses import dataclass

from safetensors.numpy import load

from fedpeft import durable
from fedpeft.records import Arrays

KEPT = 2  # the newest, and one behind it


@dataclass(frozen=True)
class Checkpoint:
    """What the server knows after `round`."""

    round: int
    arrays: Arrays  # the global adapter and head
    strategy: Arrays  # what the strategy remembers on the server
    clients: Arrays  # what simulated clients remember
    base: str = ""  # fingerprint of the base model
    data: str = ""  # digest of the data
    spent: frozenset[int] = frozenset()  # clients whose privacy budget allows no further round


def write(folder: pathlib.Path, checkpoint: Checkpoint) -> None:
    """Put `checkpoint` on disk, then drop those older than the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"round-{checkpoint.round:05d}"
    beside = folder / f".{final.name}.new"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    parts = {"arrays": checkpoint.arrays, "strategy": checkpoint.strategy, "clients": checkpoint.clients}
    files = {f"{name}.safetensors": durable.tensors(arrays) for name, arrays in parts.items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["state.json"] = json.dumps(
        {
            "round": checkpoint.round,
            "base": checkpoint.base,
            "data": checkpoint.data,
            "spent": sorted(checkpoint.spent),
            "sha256": hashes,
        }
    ).encode()
    for name, data in files.items():
        durable.write(beside / name, data)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(beside, final)
    durable.sync(folder)
    for old in _rounds(folder)[:-KEPT]:
        shutil.rmtree(old)


def latest(folder: pathlib.Path) -> Checkpoint | None:
    """The newest whole checkpoint in `folder`; torn ones are passed over."""
    for place in reversed(_rounds(folder)):
        try:
            state = json.loads((place / "state.json").read_bytes())
            data = {name: (place / name).read_bytes() for name in state["sha256"]}
        except (OSError, ValueError, KeyError):
            continue
        if all(hashlib.sha256(data[name]).hexdigest() == expected for name, expected in state["sha256"].items()):
            arrays, strategy, clients = (load(data[f"{name}.safetensors"]) for name in ("arrays", "strategy", "clients"))
            return Checkpoint(state["round"], arrays, strategy, clients, state["base"], state["data"], frozenset(state["spent"]))
    return None


def _rounds(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("round-*"))
