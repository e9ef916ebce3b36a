"""`fedpeft privacy audit`: is the claimed epsilon what the code that will run can keep? Three instruments, on the run's own parts.

Conformance (privacy/conformance.py) finds a step that does something else than is accounted; the ledger's replay finds one
that forgets; the canaries of one run (privacy/one_run.py) bound epsilon from below, whatever the reason. A pass proves nothing:
no violation was found.
"""

from __future__ import annotations

import pathlib
import tempfile
from dataclasses import dataclass

import numpy as np

from fedpeft import seeds
from fedpeft.config import Config
from fedpeft.privacy import audited_clients, conformance, replay
from fedpeft.privacy.audited_clients import ClientRound, rounds_within
from fedpeft.privacy.conformance import Check
from fedpeft.privacy.curator import Curator
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.one_run import Evidence
from fedpeft.privacy.planning import Plan, client_plan
from fedpeft.quiet import quiet_libraries
from fedpeft.records import Arrays
from fedpeft.simulations.assemble import Parts, assemble, deal
from fedpeft.training import canaries
from fedpeft.training.audited import ExampleStep

MOST_STEPS = 100  # of the run with canaries


@dataclass(frozen=True)
class Audit:
    """What was found."""

    plan: Plan
    checks: list[Check]
    evidence: Evidence
    rounds: int  # that the run with canaries had
    claimed: float  # epsilon of those rounds, by the ledger

    @property
    def violated(self) -> bool:
        """More was found out than the claim allows."""
        return self.evidence.lower > self.claimed

    @property
    def passed(self) -> bool:
        """Nothing was found."""
        return not self.violated and all(check.passed for check in self.checks)

    def lines(self) -> list[str]:
        """For people."""
        found, plan = self.evidence, self.plan
        said = [f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.said}" for check in self.checks]
        begins = f"{'FAIL' if self.violated else 'pass'}  one run of {self.rounds} of {plan.rounds} rounds"
        least = f"epsilon is at least {found.lower:.3f} ({found.confidence:.0%} confidence"
        guesses = f"{found.right} of {found.guesses} guesses right, {found.canaries} canaries)"
        outcome = "VIOLATION" if self.violated else "no violation found"
        said.append(f"{begins}: {least}; {guesses}; claimed {self.claimed:.3f} at delta {plan.delta:.2g}: {outcome}")
        if self.claimed >= found.ceiling:
            said.append(f"      such a run can show {found.ceiling:.2f} at most: a claim above that is out of its reach")
        return said


def audit(config: Config) -> Audit:
    """Audit the private step of `config`, whose `privacy` is not None. Raises UserError."""
    assert config.privacy is not None
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        return (_of_clients if config.privacy.of_clients else _of_examples)(config, pathlib.Path(folder))


def _of_examples(config: Config, folder: pathlib.Path) -> Audit:
    """The client whose plan costs the most epsilon."""
    parts = assemble(config)
    client, planned = max(parts.worker.guards.items(), key=lambda item: item[1].plan.epsilon)
    plan, data = planned.plan, parts.worker.nodes[client].train

    def guard(name: str) -> Guard:
        return Guard(plan, Ledger(folder / name), planned.C, client, planned.insecure_seed)

    step = ExampleStep(config, parts.adapted, parts.task, data, _moved(parts, config), lambda: guard("checks.jsonl"))
    checks = conformance.check(step)
    checks += replay.check(folder / "replay.jsonl", lambda round: guard("replay.jsonl").begin(round), plan.release, plan.delta)
    rounds, last = rounds_within(plan.steps, plan.rounds, MOST_STEPS), guard("canaries.jsonl")
    return Audit(plan, checks, canaries.run(step, last, rounds), rounds, last.epsilon())


def _of_clients(config: Config, folder: pathlib.Path) -> Audit:
    section, shape = config.privacy, config.strategy
    assert section is not None
    plan = client_plan(section, len(deal(config).partition.indices), shape.fraction_train, shape.num_rounds)

    def curator(name: str) -> Curator:
        return Curator(section, plan, Ledger(folder / name), shape.fraction_train)

    checks = conformance.check(ClientRound(lambda: curator("checks.jsonl")))
    checks += replay.check(folder / "replay.jsonl", ClientRound(lambda: curator("replay.jsonl")).charge, plan.release, plan.delta)
    rounds, last = rounds_within(plan.steps, plan.rounds, MOST_STEPS), curator("canaries.jsonl")
    return Audit(plan, checks, audited_clients.canaries(last, rounds), rounds, last.epsilon())


def _moved(parts: Parts, config: Config) -> Arrays:
    """A start at which every tensor has a gradient: with B = 0 that of A is zero."""
    drawn = seeds.generator(config.seed, "audit")
    return {name: array + 0.02 * drawn.normal(size=array.shape).astype(np.float32) for name, array in parts.adapted.read().items()}
