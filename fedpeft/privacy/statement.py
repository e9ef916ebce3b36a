"""What a run may say of its privacy, and what it may not: the `privacy` object of summary.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedpeft.privacy.accounting import History, upper_bound
from fedpeft.privacy.curator import Curator
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.planning import DELTA
from fedpeft.sections import PrivacySection

ASSUMPTIONS = (
    "neighbours differ by one example of one client, added or removed",
    "the adversary sees every update of every client, and the final model",
    "each step takes every example independently with probability q (Poisson sampling), which is really done",
    "no amplification by the sampling of clients is claimed",
    "the numbers of examples, q and the weights in averages are taken as public",
    "dropout draws masks for every row of a batch alike, from a seed that stays with the client",
)
NOT_COVERED = (
    "the choice of settings: learning rates or strategies that were picked on the same data",
    "the server's metrics, if its test part is private too",
    "how long a client takes, which grows with its batches: whoever sees the network sees it",
)

OF_CLIENTS = (
    "neighbours differ by one whole client, added or removed, with all of its examples and all of its updates",
    "the server is trusted: it sees the updates of single clients, and adds the noise",
    "the adversary is anybody else, other clients included: it sees the global model after every round",
    "clients weigh alike, and the sum is divided by a fixed number, whoever replied",
    "the number of clients is taken as public",
)
SECRET = "each client takes part in a round with probability q, by a coin that only the server sees, and nobody learns who took part"
VISIBLE = "a client is taken to be in every round: no amplification by the sampling of clients is claimed"
NOT_COVERED_OF_CLIENTS = (
    *NOT_COVERED,
    "the server's own records: who was asked, who replied and who was rejected stands in its run folder, and stays there",
    "single examples against the server",
)
ACCOUNTANT = "the lower of PRV's and RDP's bounds (Opacus), over all rounds at once"


def reported(section: PrivacySection, epsilons: list[float]) -> dict[str, Any]:
    """What a server may say of clients whose ledgers stay with them: the largest epsilon that any of them has stated."""
    nothing, seeded = section.noise_multiplier == 0, section.insecure_seed is not None
    worst = max(epsilons, default=0.0)
    return {
        "unit": section.unit,
        "epsilon": None if nothing or seeded else worst,
        "epsilon_if_noise_were_secret": None if nothing else worst,
        "delta": DELTA if section.target_delta is None else section.target_delta,
        "max_grad_norm": said(section.max_grad_norm),
        "accountant": "each client's own, from its own ledger; delta is at most the one given",
        "noise": _noise(section, 0.0 if nothing else 1.0),
        "assumptions": list(ASSUMPTIONS),
        "not_covered": [*NOT_COVERED, "what a client was charged for and did not get to say: its own ledger has it"],
    }


def statement(section: PrivacySection, guards: Mapping[int, Guard]) -> dict[str, Any]:
    """Unit, epsilon at delta for each client and the worst, how it was computed, and under which assumptions."""
    spent = {client: guard.epsilon() for client, guard in guards.items()}
    worst = max(spent, key=lambda client: spent[client])
    per_client = {
        guard.plan.name: {
            "epsilon": said(spent[client]),
            "delta": guard.plan.delta,
            "sigma": guard.plan.sigma,
            "q": guard.plan.q,
            "steps": sum(release.steps for release in guard.ledger.history),
            "examples": guard.plan.examples,
            "ledger": guard.ledger.hash,
        }
        for client, guard in guards.items()
    }
    plan = guards[worst].plan
    return {
        "unit": section.unit,
        **_epsilons(section, guards[worst].ledger.history, spent[worst], plan.delta),
        "worst_client": plan.name,
        "max_grad_norm": said(section.max_grad_norm),
        "accountant": ACCOUNTANT,
        "noise": _noise(section, plan.sigma),
        "per_client": per_client,
        "assumptions": list(ASSUMPTIONS),
        "not_covered": list(NOT_COVERED),
    }


def of_clients(curator: Curator) -> dict[str, Any]:
    """The same where whole clients are protected: one epsilon for all of them."""
    section, plan, ledger = curator.section, curator.plan, curator.ledger
    return {
        "unit": section.unit,
        **_epsilons(section, ledger.history, curator.epsilon(), plan.delta),
        "sigma": plan.sigma,
        "sigma_of_updates": curator.sigma,
        "sigma_of_counts": curator.count_noise or None,
        "q": plan.q,
        "fraction_train": curator.fraction,
        "rounds": sum(release.steps for release in ledger.history),
        "clients": plan.examples,
        "clipping_norm": said(section.clipping_norm),
        "denominator": curator.m,
        "accountant": ACCOUNTANT,
        "noise": _noise(section, plan.sigma),
        "ledger": ledger.hash,
        "assumptions": [*OF_CLIENTS, SECRET if section.amplification else VISIBLE],
        "not_covered": list(NOT_COVERED_OF_CLIENTS),
    }


def said(epsilon: float) -> float | None:
    """None for what is no number: JSON has no infinity."""
    return epsilon if math.isfinite(epsilon) else None


def _epsilons(section: PrivacySection, history: History, epsilon: float, delta: float) -> dict[str, Any]:
    insecure = section.insecure_seed is not None
    return {
        "epsilon": None if insecure else said(epsilon),
        "epsilon_if_noise_were_secret": said(epsilon),
        "epsilon_rdp": said(upper_bound(history, delta)),
        "delta": delta,
    }


def _noise(section: PrivacySection, sigma: float) -> str:
    if sigma == 0:
        return "none: NO guarantee"
    if section.insecure_seed is not None:
        return f"seeded with {section.insecure_seed}: NO guarantee"
    return "ChaCha20 under a key of the operating system"
