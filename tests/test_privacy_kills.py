"""kill -9 on a private run, wherever it hurts: the resumed run never states less than what was released."""

import collections
import json
import multiprocessing
import os
import signal

import pytest

from fedpeft import Config, simulate
from fedpeft.client.worker import Worker
from fedpeft.privacy import curator
from fedpeft.privacy.accounting import Release, epsilon
from fedpeft.privacy.ledger import Ledger
from fedpeft.server import checkpoint
from fedpeft.training import private

UNITS = {
    "example": ({"noise_multiplier": 2.0}, Release(2.0, 4 / 24, 1), [f"client-{k}.jsonl" for k in range(3)]),
    "client": ({"unit": "client", "noise_multiplier": 2.0}, Release(2.0, 1.0, 1), ["server.jsonl"]),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after_reserving(patch):
    """The first reservation of round 2 is on disk; nothing was made with it."""
    real = Ledger.reserve
    patch.setattr(Ledger, "reserve", lambda self, round, release: (real(self, round, release), round == 2 and die()))


def after_releasing(patch):
    """Round 2 was released, and its checkpoint is not written."""
    real = checkpoint.write
    patch.setattr(checkpoint, "write", lambda folder, whole: die() if whole.round == 2 else real(folder, whole))


def after_the_checkpoint(patch):
    """Round 2 is whole."""
    real = checkpoint.write
    patch.setattr(checkpoint, "write", lambda folder, whole: (real(folder, whole), whole.round == 2 and die()))


def noting(patch, truth):
    """Write down, past every bookkeeping, that something was released and whose it was."""
    step, noise, turn = private.released, curator.gaussian, Worker._begin

    def note(who):
        with truth.open("a") as file:
            file.write(f"{who}\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, assignment, whole):
        job = turn(self, assignment, whole)
        if getattr(job, "private", None) is not None:
            job.private.noise.client = job.client
        return job

    patch.setattr(Worker, "_begin", begin)
    patch.setattr(private, "released", lambda mechanism, total: (note(f"client-{mechanism.noise.client}.jsonl"), step(mechanism, total))[1])
    patch.setattr(curator, "gaussian", lambda source, count: (note("server.jsonl"), noise(source, count))[1])


def play(settings, out, truth, planted):
    with pytest.MonkeyPatch.context() as patch:
        noting(patch, truth)
        planted(patch)
        simulate(Config.from_dict(settings), out)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("planted", [after_reserving, after_releasing, after_the_checkpoint], ids=lambda planted: planted.__name__)
def test_a_killed_run_never_states_less_than_was_released(planted, unit, tiny_settings, tmp_path, monkeypatch):
    privacy, step, ledgers = UNITS[unit]
    settings = {**tiny_settings, "partition": {"name": "iid", "clients": 3}, "privacy": privacy}
    out, truth = tmp_path / "run", tmp_path / "truth"
    child = multiprocessing.get_context("fork").Process(target=play, args=(settings, out, truth, planted))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    noting(monkeypatch, truth)
    summary = simulate(Config.from_dict(settings), out, resume=True).summary
    assert summary["rounds_completed"] == 3
    released = collections.Counter(truth.read_text().split())
    tensors = 1 if unit == "example" else released["server.jsonl"] // (4 if planted is after_releasing else 3)
    for name in ledgers:
        charged = Ledger(out / "ledger" / name).history
        assert sum(release.steps for release in charged) >= released[name] // tensors
        assert epsilon(charged, 1e-5) >= epsilon([step] * (released[name] // tensors), 1e-5) > 0
    said = json.loads((out / "summary.json").read_text())["privacy"]
    worst = max(epsilon(Ledger(out / "ledger" / name).history, said["delta"]) for name in ledgers)
    assert said["epsilon"] == pytest.approx(worst)
    played_twice = planted is not after_the_checkpoint
    lines = [len((out / "ledger" / name).read_bytes().splitlines()) for name in ledgers]
    assert max(lines) == 3 + played_twice
