"""The reference engine: one client at a time, stock Transformers and PEFT, written to be read.

A step of client k, L the mean over the records of its batches:

    g = (clip(grad L) + mu (theta - theta_start) + penalty) M + drift;   theta <- optimiser(theta, g)

M and the optimiser of a tensor are the adapter's to say (rules.py), the rest is the strategy's (`Job`). Under differential
privacy clip(grad L) is what private.py releases instead; everything after it is post-processing. Where clipping and noise are
the identity (sigma = 0, C infinite) it is the plain gradient over the batch that the mechanism draws, divided by the expected
batch: the same code, so that private and plain runs over the same batches agree to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.data.examples import Indices
from fedpeft.lookup import find
from fedpeft.records import Failure
from fedpeft.training import private
from fedpeft.training.job import BREAKS, Job, Trained, batches, broken, dropout_seed, local_steps, rates
from fedpeft.training.rules import optimizers, set_rate


def train(adapted: Adapted, task: Any, config: Config, jobs: Sequence[Job]) -> list[Trained | Failure]:
    """Train every job from its own start, one after another. A client whose training breaks is a Failure; the others go on."""
    return [_attempt(adapted, task, config, job) for job in jobs]


def _attempt(adapted: Adapted, task: Any, config: Config, job: Job) -> Trained | Failure:
    try:
        return _train_client(adapted, task, config, job)
    except BREAKS as error:
        return broken(job, error)


def _train_client(adapted: Adapted, task: Any, config: Config, job: Job) -> Trained:
    import torch

    started = time.perf_counter()
    training = config.training
    adapted.write(job.start)
    adapted.ready(job.data)
    if job.private is not None:
        adapted.apart.ready(job.data)
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
    with seeds.torch_seed(dropout_seed(config, job), adapted.base.device):
        for rate, parts in zip(rates(config, len(job.data), job.round), batches(config, job), strict=True):
            set_rate(steppers, rate)
            for stepper in steppers:
                stepper.zero_grad()
            if job.private is not None and job.private.does_nothing:
                drawn = private.parts(job, job.private, training.per_device_train_batch_size)
                _into_gradients(adapted, task, job, drawn, job.private.batch)
            elif job.private is not None:
                private.into_gradients(adapted, task, job, job.private, trained, private.batch_size(adapted, trained, training))
            else:
                losses.append(_into_gradients(adapted, task, job, parts, sum(map(len, parts))))
                if training.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            if job.proximal:
                for parameter, anchor in zip(parameters, anchors, strict=True):
                    assert parameter.grad is not None
                    parameter.grad.add_(parameter.detach() - anchor, alpha=job.proximal)
            if job.tail[0]:
                _shrink_tail(adapted, job)
            for parameter, M in multipliers:
                assert parameter.grad is not None
                parameter.grad.copy_(parameter.grad @ M)
            for parameter, drift in drifts:
                assert parameter.grad is not None
                parameter.grad.add_(drift)
            for stepper in steppers:
                stepper.step()
    for stepper in steppers:
        stepper.zero_grad()
    loss = sum(losses) / len(losses) if losses else None
    return Trained(adapted.read(job.names), loss, local_steps(config, len(job.data)), time.perf_counter() - started)


def _into_gradients(adapted: Adapted, task: Any, job: Job, parts: Sequence[Indices], records: float) -> float:
    """The gradient of the summed loss of all `parts` over the number of `records`, zero for no parts; the loss."""
    import torch

    loss = 0.0
    if not parts:
        for name in job.names:
            adapted.parameters[name].grad = torch.zeros_like(adapted.parameters[name])
    for rows in parts:
        inputs, labels = job.data.batch(rows, adapted.base.tokenizer, adapted.base.device)
        with adapted.prefix.serving(job.data, rows):
            share = task.losses(adapted.model, inputs, labels).sum() / records
        share.backward()
        loss += float(share.detach())
    return loss


def _shrink_tail(adapted: Adapted, job: Job) -> None:
    """Add the gradient of lambda ||A[c:]|| ||B[:, c:]||, c = round(g r), to the gradients of both factors of every pair."""
    strength, kept = job.tail
    for pair in adapted.layout().pairs:
        A, B = adapted.parameters[pair.A], adapted.parameters[pair.B]
        cut = round(kept * len(job.start[pair.A]))
        a, b = float(A[cut:].detach().norm()), float(B[:, cut:].detach().norm())
        if a > 0 and b > 0:
            assert A.grad is not None and B.grad is not None
            A.grad[cut:].add_(A[cut:].detach(), alpha=strength * b / a)
            B.grad[:, cut:].add_(B[:, cut:].detach(), alpha=strength * a / b)
