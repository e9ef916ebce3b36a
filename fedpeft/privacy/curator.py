"""Client-level differential privacy, at `combine`: the server sees whole updates and releases a noisy mean of clipped ones.

    Delta_k = x_k - x                                        of every tensor that is uploaded, the head included
    x' = x + (sum_{k in S} Delta_k min(1, C / ||Delta_k||) + N(0, (z_Delta C)^2)) / m,     m = q N

S holds each of the N clients with probability q, independently. Clients count alike, and m is fixed: neither the numbers of
examples nor how many replied can move the sum by more than C for a client added or removed. A round without anybody releases
noise and is charged. What follows is post-processing: `combine` is given x' as the one update of the round.

C can follow a quantile gamma of the norms, at a cost that is part of the one sigma z (Andrew et al., theorem 1, algorithm 1):

    b = (sum_{k in S} (1[||Delta_k|| <= C] - 1/2) + N(0, sigma_b^2)) / m + 1/2,    C' = C exp(-eta (b - gamma))
    z_Delta = (z^-2 - (2 sigma_b)^-2)^-1/2

Papers: McMahan et al. 2018 (arXiv:1710.06963), algorithm 1, its fixed denominator; Andrew et al. 2021 (arXiv:1905.03871). The
latter's sigma_b = m / 20 is impossible with few clients (z < 2 sigma_b): here it is at least z, at 15 % more noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft import arrays as arithmetic
from fedpeft.errors import Problem, UserError
from fedpeft.privacy.accounting import affordable, epsilon
from fedpeft.privacy.guard import SPENT
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.noise import Insecure, Noise, Secure, gaussian
from fedpeft.privacy.planning import Plan, client_plan
from fedpeft.records import Arrays, TensorSpec, Update
from fedpeft.sections import PrivacySection

SERVER = -1  # stands where a client's number would, in seeds and in the one update of a round
CLIPPING_NORM = "privacy.clipping_norm"
"""The name under which C is kept with what the server remembers between rounds."""

SMALLEST_COUNT_NOISE = 1 / 20  # of the clients asked, as in the paper


@dataclass(frozen=True)
class Released:
    """What a round may show of its clients."""

    update: Update  # the noisy mean, as the update of one client
    clipping_norm: float  # C of the next round
    below: float | None  # noisy share of updates that were not clipped, where C follows it


class Curator:
    """The trusted party: it alone sees updates of single clients. Its plan is that of all clients together.

    Raises UserError where the noise of the count would take more than the whole of sigma.
    """

    def __init__(self, section: PrivacySection, plan: Plan, ledger: Ledger, fraction: float) -> None:
        self.section = section
        self.plan = plan
        self.ledger = ledger
        self.fraction = fraction  # q of the coins; plan.q is what is accounted, 1 without amplification
        self.m = fraction * plan.examples
        self.count_noise, self.sigma = noise_split(section, plan.sigma, self.m)

    def refusal(self) -> str | None:
        """Why no further round may be released; None when one may."""
        after = (*self.ledger.history, self.plan.release)
        if self.plan.budget is None or affordable(after, self.plan.delta, self.plan.budget):
            return None
        return f"{SPENT}: another round would reach epsilon {epsilon(after, self.plan.delta):.3f} of {self.plan.budget:g}"

    def source(self, round: int) -> Noise:
        """Randomness for one round: nobody's but the server's, unless the config says `insecure_seed`."""
        seed = self.section.insecure_seed
        return Secure() if seed is None else Insecure(seed, round, SERVER)

    def sample(self, noise: Noise, clients: Iterable[int]) -> list[int]:
        """Those of `clients` that are asked: a coin for each, so that nobody's presence changes another's chance."""
        there = sorted(clients)
        return [client for client, u in zip(there, noise.uniform(len(there)), strict=True) if u < self.fraction]

    def release(
        self,
        noise: Noise,
        updates: Iterable[Update],
        received: Arrays,
        uploads: Mapping[str, TensorSpec],
        round: int,
        C: float,
    ) -> Released:
        """Add up the updates, read once; charge the round, on disk; and only then make what it may show.

        `uploads` says what every update holds.
        """
        total, below = {name: np.zeros(spec.shape) for name, spec in sorted(uploads.items())}, 0.0
        for update in updates:
            clipped, fits = clip(arithmetic.difference(update.arrays, received), C)
            below += fits - 0.5
            for name, into in total.items():
                into += clipped[name]
        self.ledger.reserve(round, self.plan.release)
        for name, into in total.items():
            if self.sigma:
                into += (gaussian(noise, into.size) * (self.sigma * C)).reshape(into.shape)
            total[name] = (received[name] + into / self.m).astype(uploads[name].dtype)
        made = Update(round, SERVER, total, 1)
        if self.section.target_quantile is None:
            return Released(made, C, None)
        share = (below + self.count_noise * float(gaussian(noise, 1)[0])) / self.m + 0.5
        return Released(made, C * math.exp(-self.section.quantile_learning_rate * (share - self.section.target_quantile)), share)

    def epsilon(self) -> float:
        """What has been released so far."""
        return epsilon(self.ledger.history, self.plan.delta)


def clip(delta: Arrays, C: float) -> tuple[Arrays, bool]:
    """Delta min(1, C / ||Delta||) over all tensors together, and whether it was within C. What is not finite counts as zero."""
    norm = arithmetic.norm(delta)
    if not math.isfinite(norm):
        return {name: np.zeros_like(array) for name, array in delta.items()}, False
    if norm <= C:
        return delta, True
    return {name: array * (C / norm) for name, array in delta.items()}, False


def noise_split(section: PrivacySection, z: float, m: float) -> tuple[float, float]:
    """(sigma_b, z_Delta): noise on the count of unclipped updates, and the multiplier left for the updates."""
    if section.target_quantile is None or z == 0:
        return 0.0, z
    count = section.quantile_noise or max(SMALLEST_COUNT_NOISE * m, z)
    if z >= 2 * count:
        got = f"{count:g} is too little beside sigma {z:.4g}: the count alone would cost more than the budget"
        raise UserError(Problem("privacy.quantile_noise", got, f"above {z / 2:.4g}", f"such as {z:.4g}, or leave it out"))
    return count, (z**-2 - (2 * count) ** -2) ** -0.5


def curator(section: PrivacySection | None, ledger: Ledger, clients: int, fraction: float, rounds: int) -> Curator | None:
    """The curator of a run with so many clients, where its config asks for one. Raises UserError."""
    if section is None or not section.of_clients:
        return None
    return Curator(section, client_plan(section, clients, fraction, rounds), ledger, fraction)
