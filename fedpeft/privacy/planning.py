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


@dataclass(frozen=True)
class Plan:
    """One client's part."""

    name: str
    examples: int
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
    delta = min(DELTA, examples**-DELTA_POWER) if section.target_delta is None else section.target_delta
    if delta >= 1 / examples:
        got = f"{delta:g} allows the disclosure of a whole record of client {name}, which has {examples}"
        raise UserError(Problem("privacy.target_delta", got, f"below {1 / examples:.2g}", f"such as {examples**-DELTA_POWER:.2g}"))
    q = min(1.0, batch / examples)
    sigma = section.noise_multiplier
    if sigma is None:
        assert section.target_epsilon is not None
        sigma = sigma_for(section.target_epsilon, delta, q, steps * rounds, spent)
    if sigma is None:
        got = f"epsilon {section.target_epsilon:g} cannot be kept by client {name}: no noise makes {rounds} rounds of {steps} steps fit"
        raise UserError(Problem("privacy.target_epsilon", got, do="raise it, or take fewer rounds or steps"))
    return Plan(name, examples, sigma, q, steps, rounds, delta, section.target_epsilon)
