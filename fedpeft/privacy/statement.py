"""What a run may say of its privacy, and what it may not: the `privacy` object of summary.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.privacy.guard import Guard
from fedpeft.privacy.planning import DELTA
from fedpeft.sections import PrivacySection

ASSUMPTIONS = (
    "neighbours differ by one example of one client, added or removed",
    "the adversary sees every update of every client, and the final model",
    "each step takes every example independently with probability q (Poisson sampling), which is really done",
    "no amplification by the sampling of clients is claimed",
    "the numbers of examples, q and the weights in averages are taken as public",
)
NOT_COVERED = (
    "the choice of settings: learning rates or strategies that were picked on the same data",
    "the server's metrics, if its test part is private too",
)


def reported(section: PrivacySection, epsilons: list[float]) -> dict[str, Any]:
    """What a server may say of clients whose ledgers stay with them: the largest epsilon that any of them has stated."""
    return {
        "unit": section.unit,
        "epsilon": max(epsilons, default=0.0),
        "delta": DELTA if section.target_delta is None else section.target_delta,
        "max_grad_norm": section.max_grad_norm,
        "accountant": "each client's own, from its own ledger; delta is at most the one given",
        "assumptions": list(ASSUMPTIONS),
        "not_covered": list(NOT_COVERED),
    }


def statement(section: PrivacySection, guards: Mapping[int, Guard]) -> dict[str, Any]:
    """Unit, epsilon at delta for each client and the worst, how it was computed, and under which assumptions."""
    spent = {client: guard.epsilon() for client, guard in guards.items()}
    worst = max(spent, key=lambda client: spent[client])
    per_client = {
        guard.plan.name: {
            "epsilon": spent[client],
            "delta": guard.plan.delta,
            "sigma": guard.plan.sigma,
            "q": guard.plan.q,
            "steps": sum(release.steps for release in guard.ledger.history),
            "examples": guard.plan.examples,
            "ledger": guard.ledger.hash,
        }
        for client, guard in guards.items()
    }
    insecure = section.insecure_seed is not None
    return {
        "unit": section.unit,
        "epsilon": None if insecure else spent[worst],
        "epsilon_if_noise_were_secret": spent[worst],
        "delta": guards[worst].plan.delta,
        "worst_client": guards[worst].plan.name,
        "max_grad_norm": section.max_grad_norm,
        "accountant": "the lower of PRV's and RDP's bounds (Opacus), over all rounds at once",
        "noise": f"seeded with {section.insecure_seed}: NO guarantee" if insecure else "ChaCha20 under a key of the operating system",
        "per_client": per_client,
        "assumptions": list(ASSUMPTIONS),
        "not_covered": list(NOT_COVERED),
    }
