"""`Guard`: what stands between one client's data and a round. It asks the budget, charges the ledger, and only then hands out noise."""

from __future__ import annotations

from fedpeft.privacy.accounting import affordable, epsilon
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.mechanism import Mechanism
from fedpeft.privacy.noise import Insecure, Noise, Secure
from fedpeft.privacy.planning import Plan

SPENT = "privacy budget spent"


class Guard:
    """One client's plan and ledger. `insecure_seed` is for tests and repeatable studies: what it draws protects nobody."""

    def __init__(self, plan: Plan, ledger: Ledger, C: float, client: int, insecure_seed: int | None) -> None:
        self.plan = plan
        self.ledger = ledger
        self.C = C
        self.client = client
        self.insecure_seed = insecure_seed

    def refusal(self) -> str | None:
        """Why this client may not train another round; None when it may."""
        after = (*self.ledger.history, self.plan.release)
        if self.plan.budget is None or affordable(after, self.plan.delta, self.plan.budget):
            return None
        return f"{SPENT}: another round would reach epsilon {epsilon(after, self.plan.delta):.3f} of {self.plan.budget:g}"

    def begin(self, round: int) -> Mechanism:
        """Charge a round; on disk before anything is released."""
        self.ledger.reserve(round, self.plan.release)
        noise: Noise = Secure() if self.insecure_seed is None else Insecure(self.insecure_seed, round, self.client)
        return Mechanism(self.plan.sigma, self.C, self.plan.q, self.plan.q * self.plan.examples, noise)

    def epsilon(self) -> float:
        """What has been released so far."""
        return epsilon(self.ledger.history, self.plan.delta)
