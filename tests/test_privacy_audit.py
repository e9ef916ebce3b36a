"""The audit passes what is right, and fails every broken build that is planted: each by the check that is there for it."""

import pathlib

import numpy as np
import pytest
import torch
import yaml

from fedpeft import Config
from fedpeft.cli import main
from fedpeft.privacy import conformance, curator, guard, mechanism, recount, replay
from fedpeft.privacy.accounting import Release, epsilon
from fedpeft.privacy.audited_clients import ClientRound, canaries
from fedpeft.privacy.curator import Curator
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.noise import Insecure
from fedpeft.privacy.one_run import judge, lower_bound
from fedpeft.privacy.planning import client_plan
from fedpeft.simulations import privacy_audit
from fedpeft.simulations.assemble import assemble
from fedpeft.training import canaries as example_canaries
from fedpeft.training import private
from fedpeft.training.audited import ExampleStep

CHECKS = {check.__name__: check for check in conformance.CHECKS}


@pytest.fixture
def settings(tiny_settings):
    return {
        **tiny_settings,
        "partition": {"name": "iid", "clients": 3},
        "privacy": {"noise_multiplier": 3.0},
        "strategy": {"num_rounds": 10},
    }


@pytest.fixture(params=["one", "many"])
def examples(request, settings, tmp_path):
    """The step of a client, in either engine."""
    return step_of(settings, tmp_path, engine=request.param)


@pytest.fixture
def step(settings, tmp_path):
    return step_of(settings, tmp_path)


def step_of(settings, folder, **training):
    config = Config.from_dict({**settings, "training": {**settings["training"], **training}})
    parts = assemble(config)
    one = parts.worker.guards[0]

    def made():
        return Guard(one.plan, Ledger(folder / "checks.jsonl"), one.C, 0, None)

    return ExampleStep(config, parts.adapted, parts.task, parts.worker.nodes[0].train, privacy_audit._moved(parts, config), made)


def curator_of(path, **own):
    section = Config.from_dict({"privacy": {"unit": "client", "noise_multiplier": 8.0, **own}, "training": {"head_init": "random"}}).privacy
    return Curator(section, client_plan(section, 30, 0.4, 20), Ledger(path), 0.4)


@pytest.fixture
def clients(tmp_path):
    return ClientRound(lambda: curator_of(tmp_path / "server.jsonl"))


def failed(checks):
    return [check.name for check in checks if not check.passed]


# --- the real ones pass


def test_the_step_of_both_engines_passes(examples):
    assert not failed(conformance.check(examples))


ADAPTERS = {
    "lora_sb": {"name": "lora_sb", "r": 4, "start": "orthonormal", "target_modules": ["query"]},
    "fora": {"name": "fora", "r": 2, "layers": 1, "target_modules": ["query"]},
    "lora_fa": {"name": "lora_fa", "r": 2, "target_modules": ["query"]},
    "dora": {"name": "dora", "r": 2, "target_modules": ["query"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_step_passes_with_other_adapters(adapter, settings, tmp_path):
    """What Cayley-Adam (fora) and the correction of lora_fa do comes after the release: their gradients are looked at before it."""
    strategy = {"name": "fed_sb" if adapter == "lora_sb" else "fedavg", "num_rounds": 2}
    found = step_of({**settings, "adapter": ADAPTERS[adapter], "strategy": strategy}, tmp_path)
    assert not failed(conformance.check(found))


@pytest.mark.parametrize("own", [{}, {"amplification": True}, {"target_quantile": 0.5}])
def test_the_release_of_clients_passes(own, tmp_path):
    checks = conformance.check(ClientRound(lambda: curator_of(tmp_path / "server.jsonl", **own)))
    assert not failed(checks), checks


def test_the_ledgers_of_both_pass(step, clients, tmp_path):
    mine = replay.check(tmp_path / "a.jsonl", lambda round: again(step, tmp_path / "a.jsonl").begin(round), Release(3.0, 4 / 24, 2), 1e-5)
    theirs = ClientRound(lambda: curator_of(tmp_path / "b.jsonl")).charge
    assert not failed([*mine, *replay.check(tmp_path / "b.jsonl", theirs, Release(8.0, 1.0, 1), 1e-5)])


def again(step, path):
    return Guard(step.guard().plan, Ledger(path), step.C, 0, None)


# --- broken builds of the step of examples


def no_noise(monkeypatch):
    monkeypatch.setattr(mechanism, "gaussian", lambda source, count: np.zeros(count))


def noise_divided_twice(monkeypatch, real=mechanism.gaussian):
    monkeypatch.setattr(mechanism, "gaussian", lambda source, count: real(source, count) / 4)


def noise_only_where_there_are_examples(monkeypatch, real=private.released):
    monkeypatch.setattr(
        private,
        "released",
        lambda m, total: (
            real(m, total) if any(value.any() for value in total.values()) else {name: value / m.batch for name, value in total.items()}
        ),
    )


def clipped_by_batch(monkeypatch):
    def clipped(rows, C):
        whole = {name: row.sum(dim=0) for name, row in rows.items()}
        norm = float(torch.cat([value.flatten() for value in whole.values()]).norm())
        return {name: value * min(1.0, C / norm) for name, value in whole.items()}

    monkeypatch.setattr(private, "clipped_sum", clipped)


def clipped_by_tensor(monkeypatch, real=private.clipped_sum):
    monkeypatch.setattr(private, "clipped_sum", lambda rows, C: {name: real({name: row}, C)[name] for name, row in rows.items()})


def not_clipped(monkeypatch):
    monkeypatch.setattr(private, "clipped_sum", lambda rows, C: {name: row.sum(dim=0) for name, row in rows.items()})


def over_the_actual_batch(monkeypatch, parts=private.parts, real=private.released):
    seen = []
    monkeypatch.setattr(private, "parts", lambda *given: seen.append(sum(map(len, found := parts(*given)))) or found)
    monkeypatch.setattr(
        private, "released", lambda m, total: {name: value * (m.batch / max(1, seen[-1])) for name, value in real(m, total).items()}
    )


def noise_used_again(monkeypatch):
    monkeypatch.setattr(guard, "Secure", lambda: Insecure(7, 1, 1))


def shuffled(monkeypatch):
    drawn = np.random.default_rng(0)
    monkeypatch.setattr(private, "poisson", lambda noise, n, q: np.sort(drawn.permutation(n)[: round(n * q)]))


def twice_as_often(monkeypatch, real=private.poisson):
    monkeypatch.setattr(private, "poisson", lambda noise, n, q: real(noise, n, 1.2 * q))


STEP = {
    no_noise: "noise_size",
    noise_divided_twice: "noise_size",
    noise_only_where_there_are_examples: "noise_size",
    clipped_by_batch: "addition",
    clipped_by_tensor: "clipping",
    not_clipped: "clipping",
    over_the_actual_batch: "addition",
    noise_used_again: "freshness",
    shuffled: "sampling",
    twice_as_often: "sampling",
}


@pytest.mark.parametrize("broken", STEP, ids=lambda broken: broken.__name__)
def test_a_broken_step_fails(broken, step, monkeypatch):
    check = CHECKS[STEP[broken]]
    assert check(step).passed
    broken(monkeypatch)
    assert not conformance.attempt(check, step).passed


# --- broken builds of the release of clients


def weights(self, noise, updates, received, uploads, round, C, real=Curator.release):
    total, scaled = sum(update.examples for update in updates), []
    for update in updates:
        far = {n: update.arrays[n] - received[n] for n in received}
        near, _ = curator.clip(far, C)
        shared = {n: received[n] + near[n] * (self.m * update.examples / total) for n in received}
        scaled.append(type(update)(1, update.client, shared, 1))
    return real(self, noise, scaled, received, uploads, round, np.inf)


def actual(self, noise, updates, received, uploads, round, C, real=Curator.release):
    kept, self.m = self.m, max(1, len(updates))
    try:
        return real(self, noise, updates, received, uploads, round, C)
    finally:
        self.m = kept


ROUND = {
    "no noise": (curator, "gaussian", lambda source, count: np.zeros(count), "noise_size"),
    "weights by examples": (Curator, "release", weights, "addition"),
    "the actual number": (Curator, "release", actual, "addition"),
    "tensor by tensor": (
        curator,
        "clip",
        lambda delta, C: ({n: a * min(1, C / np.linalg.norm(a)) for n, a in delta.items()}, True),
        "clipping",
    ),
    "reused noise": (Curator, "source", lambda self, round: Insecure(1, 1, 1), "freshness"),
    "a fixed number": (Curator, "sample", lambda self, noise, there: np.random.default_rng().permutation(30)[:12], "sampling"),
}


@pytest.mark.parametrize("broken", ROUND)
def test_a_broken_release_of_clients_fails(broken, clients, monkeypatch):
    where, name, mutant, check = ROUND[broken]
    assert CHECKS[check](clients).passed
    monkeypatch.setattr(where, name, mutant)
    assert not conformance.attempt(CHECKS[check], clients).passed


# --- ledgers that forget


def overwritten(self, round, release, real=Ledger.reserve):
    if self.path is not None and self.path.exists():
        self.path.unlink()
    self.history, self.hash = (), "0" * 64
    real(self, round, release)


def refunded(self, round, release, real=Ledger.reserve):
    """A round that is played again is charged once."""
    if self.path is not None and self.path.exists() and f'"round": {round},' in self.path.read_text():
        return
    real(self, round, release)


def kept_in_memory(self, round, release):
    self.history = (*self.history, release)


@pytest.mark.parametrize("broken", [overwritten, refunded, kept_in_memory])
def test_a_ledger_that_forgets_fails(broken, step, tmp_path, monkeypatch):
    monkeypatch.setattr(Ledger, "reserve", broken)
    path = tmp_path / "a.jsonl"
    (path).touch()
    assert failed(replay.check(path, lambda round: again(step, path).begin(round), Release(3.0, 4 / 24, 2), 1e-5))


def test_a_ledger_that_believes_everything_fails(step, tmp_path, monkeypatch):
    def believing(self, line):
        import json

        entry = json.loads(line)
        self.history = (*self.history, Release(entry["sigma"], entry["q"], entry["steps"]))
        self.hash = __import__("hashlib").sha256(line).hexdigest()

    monkeypatch.setattr(Ledger, "_read", believing)
    path = tmp_path / "a.jsonl"
    checks = replay.check(path, lambda round: again(step, path).begin(round), Release(3.0, 4 / 24, 2), 1e-5)
    assert failed(checks) == ["an edited ledger is refused"]


def test_an_epsilon_of_the_last_round_alone_fails(step, tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "epsilon", lambda history, delta: epsilon(history[-1:], delta))
    path = tmp_path / "a.jsonl"
    checks = replay.check(path, lambda round: again(step, path).begin(round), Release(3.0, 4 / 24, 2), 1e-5)
    assert failed(checks) == ["the ledger's epsilon is found in another way"]


# --- one run with canaries


@pytest.mark.parametrize(
    ("m", "r", "v", "confidence", "published"),
    [(500, 100, 100, 0.95, 3.4792), (500, 100, 100, 0.99, 3.0232), (500, 100, 60, 0.95, 0.0507), (500, 35, 23, 0.95, 0.0145)],
)
def test_lower_bounds_are_the_published_ones(m, r, v, confidence, published):
    assert lower_bound(m, r, v, 1e-5, confidence) == pytest.approx(published, abs=1e-3)


def test_guesses_without_knowledge_prove_nothing():
    drawn = np.random.default_rng(0)
    found = [judge(drawn.normal(size=1000), drawn.random(1000) < 0.5, 1e-5).lower for _ in range(50)]
    assert np.mean(np.array(found) == 0) > 0.9
    perfect = drawn.random(1000) < 0.5
    assert judge(perfect.astype(float), perfect, 1e-5).lower == pytest.approx(3.6956, abs=1e-3)


BROKEN_RUNS = {"no noise": no_noise, "not clipped": not_clipped, None: lambda monkeypatch: None}


@pytest.mark.parametrize("broken", BROKEN_RUNS)
def test_the_canaries_of_a_run_find_what_is_broken_and_nothing_else(broken, step, tmp_path, monkeypatch):
    BROKEN_RUNS[broken](monkeypatch)
    last = again(step, tmp_path / "canaries.jsonl")
    found = example_canaries.run(step, last, rounds=10)
    claimed = last.epsilon()
    assert claimed < found.ceiling
    assert (found.lower > claimed) == (broken is not None)


@pytest.mark.parametrize("broken", ["gaussian", None])
def test_the_canaries_among_clients_find_what_is_broken_and_nothing_else(broken, tmp_path, monkeypatch):
    if broken:
        monkeypatch.setattr(curator, "gaussian", lambda source, count: np.zeros(count))
    last = curator_of(tmp_path / "server.jsonl")
    found = canaries(last, rounds=3)
    assert (found.lower > last.epsilon()) == (broken is not None)


# --- a second way to epsilon


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "pld"),
    [
        (256 / 60000, 1.1, 14062, 1e-5, 2.3817),
        (0.02, 1.5, 2500, 1e-5, 3.2320),
        (1.0, 1.0, 1, 1e-5, 4.3772),
        (0.05, 0.6, 200, 1e-4, 13.1187),
    ],
)
def test_the_second_way_gives_the_reference_epsilons(q, sigma, steps, delta, pld):
    assert recount.epsilon([Release(sigma, q, steps)], delta) == pytest.approx(pld, abs=6e-3)


# --- the command


def test_the_command_says_pass_or_fails(settings, tmp_path, capsys, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert main(["privacy", "audit", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.count("pass  ") == 9
    assert "claimed 1." in said
    assert "no violation found" in said
    no_noise(monkeypatch)
    assert main(["privacy", "audit", str(file)]) == 1
    said = capsys.readouterr().out
    assert "FAIL  noise of sigma C" in said
    assert "VIOLATION" in said
    assert main(["privacy", "audit", str(file), "privacy=null"]) == 2


def test_the_command_audits_clients(settings, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({**settings, "privacy": {"unit": "client", "noise_multiplier": 5.0}}))
    assert main(["privacy", "audit", str(file)]) == 0
    assert capsys.readouterr().out.count("pass  ") == 9


def test_seeded_noise_fails_the_audit(settings, tmp_path, capsys):
    file = pathlib.Path(tmp_path / "c.yaml")
    file.write_text(yaml.safe_dump({**settings, "privacy": {"noise_multiplier": 3.0, "insecure_seed": 1}}))
    assert main(["privacy", "audit", str(file)]) == 1
    assert "FAIL  noise is never used twice" in capsys.readouterr().out
