"""The reference engine: one client at a time, stock Transformers and PEFT, written to be read.

A step of client k, with L the mean loss over the records of the step's batches:

    g = (clip(grad L) + mu (theta - theta_start)) M + drift;   theta <- optimiser(theta, g)

M and the optimiser of a tensor are the adapter's to say (rules.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.lookup import find
from fedpeft.records import Failure
from fedpeft.training.job import Job, Trained, batches, rates
from fedpeft.training.rules import optimizers, set_rate


def train(adapted: Adapted, task: Any, config: Config, jobs: Sequence[Job]) -> list[Trained | Failure]:
    """Train every job from its own start, one after another. A client whose training breaks is a Failure; the others go on."""
    return [_attempt(adapted, task, config, job) for job in jobs]


def _attempt(adapted: Adapted, task: Any, config: Config, job: Job) -> Trained | Failure:
    try:
        return _train_client(adapted, task, config, job)
    except (RuntimeError, ValueError, IndexError, ArithmeticError) as error:  # what torch raises, out of memory included
        return Failure(job.round, job.client, f"training broke: {error}")


def _train_client(adapted: Adapted, task: Any, config: Config, job: Job) -> Trained:
    import torch

    started = time.perf_counter()
    training = config.training
    adapted.write(job.start)
    parameters = adapted.train_only(job.names)
    trained = dict(zip(job.names, parameters, strict=True))
    steppers = optimizers(trained, job.rules, find("optimizer", training.optimizer), training.weight_decay)
    multipliers, drifts = (
        [(adapted.parameters[name], torch.from_numpy(arrays[name]).to(adapted.base.device)) for name in sorted(arrays)]
        for arrays in (job.rules.multipliers, job.drift)
    )
    losses: list[float] = []
    anchors = [parameter.detach().clone() for parameter in parameters] if job.proximal else []
    adapted.model.train()
    with seeds.torch_seed(seeds.derive(config.seed, "dropout", job.round, job.client), adapted.base.device):
        for rate, parts in zip(rates(config, len(job.data), job.round), batches(config, job), strict=True):
            set_rate(steppers, rate)
            for stepper in steppers:
                stepper.zero_grad()
            records = sum(len(rows) for rows in parts)
            loss = 0.0
            for rows in parts:
                inputs, labels = job.data.batch(rows, adapted.base.tokenizer, adapted.base.device)
                share = task.loss(adapted.model(**inputs).logits, labels).sum() / records
                share.backward()
                loss += float(share.detach())
            if training.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            if job.proximal:
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - anchor, alpha=job.proximal)
            for parameter, M in multipliers:
                assert parameter.grad is not None
                parameter.grad.copy_(parameter.grad @ M)
            for parameter, drift in drifts:
                assert parameter.grad is not None
                parameter.grad.add_(drift)
            for stepper in steppers:
                stepper.step()
            losses.append(loss)
    for stepper in steppers:
        stepper.zero_grad()
    return Trained(adapted.read(job.names), sum(losses) / len(losses), len(losses), time.perf_counter() - started)
