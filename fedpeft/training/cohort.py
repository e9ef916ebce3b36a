"""One cohort's turn: several clients of one engine call, trained together from their starts to their ends.

One forward and one backward pass give every client its own gradient. Clipping, FedProx, SCAFFOLD, schedule and optimiser
then act on the rows of one matrix, a row a client. Clients that have finished their steps leave.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.data.examples import Indices
from fedpeft.records import Failure
from fedpeft.training import memory
from fedpeft.training.job import Job, Trained, batches, dropout_seed, rates
from fedpeft.training.lanes import Lanes, forgetful, remembered
from fedpeft.training.masks import Dropouts, Masks, Span, UnsuitedError
from fedpeft.training.passes import Batch, Pass, Plan, Rows, deal, length, pools
from fedpeft.training.seating import seat
from fedpeft.training.stacked import Stacked
from fedpeft.training.stacked_layers import stacked
from fedpeft.training.stacked_private import StackedPrivacy
from fedpeft.training.stacked_rules import StackedRules, order

if TYPE_CHECKING:
    import torch

Parts = list[Indices]  # the batches of one step of one client, [accumulation][batch]


@dataclass(frozen=True)
class Setting:
    """What every cohort of a call shares."""

    adapted: Adapted
    task: Any
    config: Config


class CohortTraining:
    """One cohort, from its jobs' starts to their ends. Seats are places in it, those with the most steps first."""

    def __init__(self, setting: Setting, jobs: Sequence[Job], divisor: int) -> None:
        import torch

        self.config, self.adapted, self.task, self.device = setting.config, setting.adapted, setting.task, setting.adapted.base.device
        self.divisor = divisor  # of the tokens of a pass
        self.adapted.ready(jobs[0].data)
        self.adapted.apart.ready(jobs[0].data)
        if self.adapted.apart.obstacle:
            raise UnsuitedError(self.adapted.apart.obstacle)
        plans = [batches(self.config, job) for job in jobs]
        self.order = sorted(range(len(jobs)), key=lambda place: -len(plans[place]))
        self.jobs = [jobs[place] for place in self.order]
        self.plans: list[list[Parts]] = [plans[place] for place in self.order]  # [clients][steps]
        private = self.jobs[0].private is not None
        starts = [job.start for job in self.jobs]
        self.lanes = Lanes[Pass](self.device)
        self.trained = Stacked(starts, order(self.jobs[0]), self.device, self.lanes.count, by_row=private)
        self.cohort = seat(self.adapted, starts, self.trained)
        self.rules = StackedRules(self.config, self.adapted.layout(), self.jobs, self.trained)
        self.private = StackedPrivacy(self.config, self.adapted, self.jobs, self.trained) if private else None
        self.generators = [torch.Generator(self.device).manual_seed(dropout_seed(self.config, job)) for job in self.jobs]
        self.rows = [0] * len(self.jobs)  # of each client, that went through the model
        self.drops = True  # the model asks for dropout masks, for all we know

    def run(self) -> list[Trained | Failure]:
        """Train; what came of the jobs, in the order they were given in."""
        import torch

        started = time.perf_counter()
        steps = [len(plan) for plan in self.plans]
        schedules = np.zeros((steps[0], len(self.jobs)), np.float32)
        for place, job in enumerate(self.jobs):
            schedules[: steps[place], place] = rates(self.config, len(job.data), job.round)
        self.adapted.model.train()
        losses = torch.zeros(steps[0], self.lanes.count, len(self.jobs), device=self.device)
        with stacked(self.adapted, self.cohort), self.lanes:
            self._probe()
            before = self._randomness()
            for step in range(steps[0]):
                n = sum(count > step for count in steps)  # those who are not done come first
                self.trained.gradients.zero_()
                if self.private is not None:
                    self._backward([self.private.parts(place) for place in range(n)], losses[step])
                    self.private.release(n)
                else:
                    self._backward([self.plans[place][step] for place in range(n)], losses[step])
                    if self.config.training.max_grad_norm is not None:
                        _clip(self.trained.gradient[:n], self.config.training.max_grad_norm)
                self.rules.step(n, torch.from_numpy(schedules[step, :n, None]).to(self.device))
            if self._randomness() != before:
                raise UnsuitedError("the model draws random numbers of its own")
        return self._ended(losses.sum(dim=1).cpu().numpy(), steps, time.perf_counter() - started)

    def _backward(self, plans: Sequence[Parts], losses: torch.Tensor) -> None:
        """The gradient of a step of the first clients, whose batches are `plans`; each lane's losses [lanes, clients] are added up."""

        def learn(one_pass: Pass, lane: int) -> None:
            loss = self._forward(one_pass, lane)
            loss.sum().backward()  # type: ignore[no-untyped-call]
            losses[lane].index_add_(0, self.cohort.seats, loss.detach())
            if self.private is not None:
                self.private.take(self.cohort.seats, lane)

        for together in self._batches(plans):
            for pool in pools(together, self.pool_tokens):
                self.lanes.run(deal(pool, self.side_by_side, self.plan), learn)
        self.trained.add_up(len(plans))

    def _batches(self, plans: Sequence[Parts]) -> Iterator[Iterator[Batch]]:
        """What may be dealt into passes together: everything, or with dropout one batch a client, whose masks come in its own order."""
        most = max(len(plan) for plan in plans)
        wheres = [slice(part, part + 1) for part in range(most)] if self.drops else [slice(None)]
        for where in wheres:
            yield (self._batch(place, plan, rows) for place, plan in enumerate(plans) for rows in plan[where])

    def _batch(self, place: int, plan: Parts, rows: Indices) -> Batch:
        data = self.jobs[place].data
        self.rows[place] += len(rows)
        masks = Masks(self.generators[place], len(rows), max(length(data, int(row)) for row in rows))
        share = 1.0 if self.private is not None else 1.0 / sum(len(rows) for rows in plan)
        return Batch(place, data, rows, share, masks)

    def _forward(self, one_pass: Pass, lane: int = 0) -> torch.Tensor:
        """Each row's share of its client's loss, [rows]."""
        import torch

        inputs, labels = one_pass.tensors(self.adapted.base.tokenizer, self.device)
        self.cohort.sit(one_pass.seats(), one_pass.time, self.device, lane)
        with self.adapted.prefix.serving(one_pass.data, np.arange(len(one_pass.data))), self._dropouts(one_pass):
            loss: torch.Tensor = self.task.losses(self.adapted.model, inputs, labels)
        return loss * torch.tensor(one_pass.shares(), device=self.device)

    def _dropouts(self, one_pass: Pass) -> AbstractContextManager[Any]:
        """What answers the model's dropouts; nothing, where the probe met none."""
        if not self.drops:
            return nullcontext()
        spans, start = [], 0
        for part in one_pass.parts:
            assert part.batch.masks is not None
            spans.append(Span(part.batch.masks, part.chosen, start))
            start = spans[-1].stop
        mode: AbstractContextManager[Any] = Dropouts(spans, one_pass.time).mode()
        return mode

    def _probe(self) -> None:
        """Send one row through the model, to see that it can be done and how much may be done at once."""
        import torch

        longest, place = max((length(job.data, row), -place) for place, job in enumerate(self.jobs) for row in range(len(job.data)))
        data = self.jobs[-place].data
        row = next(row for row in range(len(data)) if length(data, row) == longest)
        masks = Masks(torch.Generator(self.device).manual_seed(0), 1, longest)
        before, held = self._randomness(), remembered(self.adapted.model)
        with memory.counted([*self.adapted.model.parameters(), *(own.values for own in self.cohort.tensors.values())]) as kept:
            loss = self._forward(Pass((Rows(Batch(-place, data, np.array([row]), 1.0, masks), [0]),))).sum()
        if self._randomness() != before:
            raise UnsuitedError("the model draws random numbers of its own")
        lanes = self.lanes.count if forgetful(held) else 1
        loss.backward()  # type: ignore[no-untyped-call]
        if untouched := [name for name, own in self.trained.tensors.items() if not own.reached]:
            raise UnsuitedError(f"{untouched[0]} gets no gradient")
        for own in self.trained.tensors.values():
            own.rows.clear()
        fit = memory.tokens_at_once(self.config.training, self.device, kept() / longest) // self.divisor
        most = None
        if self.private is not None:
            most = max(1, memory.rows_at_once(self.config.training, self.device, self.trained.width) // self.divisor)
        self.side_by_side = max(1, min(lanes, fit // longest, most or lanes))  # passes, each of which must have room for a row
        tokens = max(longest, memory.tokens_of_a_pass(self.device, self.side_by_side, fit))
        self.plan = Plan(tokens, most and most // self.side_by_side, memory.overhead(self.device))
        drawn = sum(mask.nbytes for mask in masks.drawn)
        self.drops = drawn > 0
        self.pool_tokens = memory.tokens_with_masks(self.config.training, self.device, drawn / longest, tokens * self.side_by_side)

    def _randomness(self) -> bytes:
        """The state of torch's own generators: it changes when a model draws numbers that no client's generator gave."""
        import torch

        state = torch.get_rng_state().numpy().tobytes()
        return state + torch.cuda.get_rng_state(self.device).numpy().tobytes() if self.device.startswith("cuda") else state

    def _ended(self, losses: np.ndarray[Any, Any], steps: Sequence[int], seconds: float) -> list[Trained | Failure]:
        """Each job's arrays and loss, and its share of the time, by rows."""
        ended: dict[int, Trained | Failure] = {}
        for place, (job, number) in enumerate(zip(self.jobs, self.order, strict=True)):
            loss = None if self.private is not None else float(losses[: steps[place], place].mean())
            share = self.rows[place] / max(1, sum(self.rows)) if self.private is None else steps[place] / sum(steps)  # batches are secret
            ended[number] = Trained(self.trained.read(place, job.names), loss, steps[place], seconds * share)
        return [ended[number] for number in range(len(ended))]


def _clip(gradients: torch.Tensor, norm: float) -> None:
    """Scale each client's gradient down to `norm`, as torch does for one."""
    gradients.mul_((norm / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0))
