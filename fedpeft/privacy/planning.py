"""What one client will do under differential privacy, decided before anything is trained: the noise for the whole run.

q = b / n with the expected batch b and the client's own n, both fixed here and taken as public. Sigma is solved for the worst
case, a client that takes part in every round; taking part less costs less, and is counted by the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.errors import Problem, UserError
from fedpeft.privacy.accounting import History, Release, epsilon, sigma_for
from fedpeft.sections import PrivacySection

DELTA = 1e-5
DELTA_POWER = 1.1  # delta is at most n ** -1.1 where none is given
ALL = "all clients"  # whose plan it is where whole clients are protected


@dataclass(frozen=True)
class Plan:
    """One client's part, or that of all clients together where the unit is a client."""

    name: str
    examples: int  # n: what the unit is one of
    sigma: float
    q: float
    steps: int  # in a round
    rounds: int
    delta: float
    budget: float | None  # epsilon that no round may go beyond

    @property
    def release(self) -> Release:
        """What one round releases."""
        return Release(self.sigma, self.q, self.steps)

    @property
    def epsilon(self) -> float:
        """After all rounds, every one of them taken."""
        return epsilon([Release(self.sigma, self.q, self.steps * self.rounds)], self.delta)


def plan(section: PrivacySection, name: str, examples: int, batch: int, steps: int, rounds: int, spent: History = ()) -> Plan:
    """The plan of a client with so many examples, of which a step takes `batch` in expectation.

    Raises UserError for a delta that is no protection among so few examples, and where no noise would do.
    """
    return _plan(section, name, examples, min(1.0, batch / examples), steps, rounds, spent, f"a whole record of client {name}, which has")


def client_plan(section: PrivacySection, clients: int, fraction: float, rounds: int) -> Plan:
    """The plan of the server, for which whole clients are the records and a round is a step.

    Without amplification q = 1: a client is taken to be in every round. Raises UserError as `plan`.
    """
    q = fraction if section.amplification else 1.0
    return _plan(section, ALL, clients, q, 1, rounds, (), "a whole client out of")


def _plan(section: PrivacySection, name: str, n: int, q: float, steps: int, rounds: int, spent: History, whole: str) -> Plan:
    delta = min(DELTA, n**-DELTA_POWER) if section.target_delta is None else section.target_delta
    if delta >= 1 / n:
        got = f"{delta:g} allows the disclosure of {whole} {n}"
        raise UserError(Problem("privacy.target_delta", got, f"below {1 / n:.2g}", f"such as {n**-DELTA_POWER:.2g}"))
    sigma = section.noise_multiplier
    if sigma is None:
        assert section.target_epsilon is not None
        sigma = sigma_for(section.target_epsilon, delta, q, steps * rounds, spent)
    if sigma is None:
        got = f"epsilon {section.target_epsilon:g} cannot be kept by {name}: no noise makes {rounds} rounds of {steps} steps fit"
        raise UserError(Problem("privacy.target_epsilon", got, do="raise it, or take fewer rounds or steps"))
    return Plan(name, n, sigma, q, steps, rounds, delta, section.target_epsilon)
