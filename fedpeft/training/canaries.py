"""Canaries among a client's examples: gradients of their own direction, put in by a coin, and looked for in what is released.

A canary's row is zero but for one number, chosen for it alone, far beyond C. It goes the way of every example: it is sampled,
clipped, added, noised. An auditor who sees every step, as the server nearly does, scores it by the sum of what was released at
its number. Examples of text used as canaries have no such power: what one moves, others move too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.data.examples import Indices
from fedpeft.privacy.guard import Guard
from fedpeft.privacy.noise import Secure
from fedpeft.privacy.one_run import Evidence, judge
from fedpeft.privacy.per_example import Rows
from fedpeft.training import private
from fedpeft.training.audited import ExampleStep
from fedpeft.training.job import Job

CANARIES = 1000
FAR = 100.0  # times C


def run(step: ExampleStep, guard: Guard, rounds: int) -> Evidence:
    """Train for `rounds` with canaries among the examples, charging each to `guard`, and guess which were in."""
    import torch

    step.adapted.write(step.start)
    trained = dict(zip(step.names, step.adapted.train_only(step.names), strict=True))
    ends = list(itertools.accumulate(parameter.numel() for parameter in trained.values()))
    m = min(CANARIES, ends[-1] // 4)
    secret = np.random.default_rng(int(Secure().uniform(1)[0] * 2**53))
    places, included = secret.choice(ends[-1], m, replace=False), secret.random(m) < 0.5
    own = places[included]  # of canary n + j, the j-th that is in

    def rows_of(adapted: Adapted, task: Any, job: Job, part: Indices, trained: Mapping[str, Any]) -> Rows:
        real = part[part < step.n]
        found = private.rows(adapted, task, job, real, trained) if len(real) else {}
        flat = torch.zeros(len(part) - len(real), ends[-1])
        flat[torch.arange(len(flat)), torch.from_numpy(own[part[len(real) :] - step.n])] = FAR * step.C
        made = {
            name: flat[:, end - p.numel() : end].to(p.device).reshape(-1, *p.shape)
            for end, (name, p) in zip(ends, trained.items(), strict=True)
        }
        return {name: torch.cat([found[name], made[name]]) if found else made[name] for name in trained}

    filler = [step.data.inputs[0]] * len(own), np.zeros(len(own), np.int64)
    data = Encoded(step.data.inputs + filler[0], np.concatenate([step.data.labels, filler[1]]), step.data.label_count)
    scores, size = np.zeros(m), private.batch_size(step.adapted, trained, step.config.training)
    step.adapted.model.train()
    for round in range(1, rounds + 1):
        mechanism = guard.begin(round)
        for _ in range(guard.plan.steps):
            private.into_gradients(step.adapted, step.task, step.job(mechanism, data), mechanism, trained, size, rows_of)
            released = np.concatenate(
                [parameter.grad.cpu().numpy().ravel() for parameter in trained.values() if parameter.grad is not None]
            )
            scores += released[places]
            with torch.no_grad():
                for parameter in trained.values():
                    assert parameter.grad is not None
                    parameter.sub_(parameter.grad, alpha=step.config.training.learning_rate)
    step.adapted.model.zero_grad()
    return judge(scores, included, guard.plan.delta)
