"""Checkpoints are whole or not there; the newest whole one is used."""

import shutil

import numpy as np
import pytest

from fedpeft.arrays import digest
from fedpeft.server import checkpoint
from fedpeft.server.checkpoint import Checkpoint, latest, write


def state(round):
    return Checkpoint(round, {"w": np.full((2, 2), round, np.float32)}, {"m": np.array([round], np.float64)}, {"0/n": np.ones(2)})


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, state(3))
    found = latest(tmp_path)
    assert found.round == 3
    assert digest(found.arrays) == digest(state(3).arrays)
    assert digest(found.strategy) == digest(state(3).strategy)


def test_the_memory_order_of_an_array_does_not_matter(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path, Checkpoint(1, {"w": np.asfortranarray(array), "v": array[:, ::2], "n": np.array(7)}, {}, {}))
    found = latest(tmp_path).arrays
    assert found["n"].shape == ()
    assert np.array_equal(found["w"], array)
    assert np.array_equal(found["v"], array[:, ::2])


def test_no_checkpoint_is_none(tmp_path):
    assert latest(tmp_path / "nowhere") is None


def test_the_newest_is_used_and_old_ones_go(tmp_path):
    for round in range(12):
        write(tmp_path, state(round))
    assert latest(tmp_path).round == 11
    assert len(list(tmp_path.glob("round-*"))) == checkpoint.KEPT


@pytest.mark.parametrize("name", ["arrays.safetensors", "strategy.safetensors", "clients.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["torn", "gone", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    write(tmp_path, state(1))
    write(tmp_path, state(2))
    file = sorted(tmp_path.glob("round-*"))[-1] / name
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "torn":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert latest(tmp_path).round == 1


def test_a_write_that_was_cut_off_leaves_the_last_one(tmp_path, monkeypatch):
    write(tmp_path, state(1))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, state(2))
    monkeypatch.undo()
    assert latest(tmp_path).round == 1
    write(tmp_path, state(2))
    assert latest(tmp_path).round == 2
    shutil.rmtree(tmp_path)
