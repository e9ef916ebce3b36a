"""One cohort's turn: several clients of one engine call, trained together from their starts to their ends.

One forward and one backward pass give every client its own gradient. Clipping, FedProx, SCAFFOLD, schedule and optimiser
then act on the rows of one matrix, a row a client. Clients that have finished their steps leave.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.data.examples import Indices
from fedpeft.lookup import find
from fedpeft.products import Product
from fedpeft.records import MERGED, Arrays, Failure, merge_names, merged_module, merged_round
from fedpeft.training import memory
from fedpeft.training.job import Job, Trained, batches, dropout_seed, rates
from fedpeft.training.masks import Dropouts, Masks, Span, UnsuitedError
from fedpeft.training.passes import Batch, Pass, Rows, cut, length, pools
from fedpeft.training.stacked import Stacked
from fedpeft.training.stacked_layers import Cohort, stacked

if TYPE_CHECKING:
    import torch


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
        plans = [batches(self.config, job) for job in jobs]
        self.order = sorted(range(len(jobs)), key=lambda place: -len(plans[place]))
        self.jobs = [jobs[place] for place in self.order]
        self.plans: list[list[list[Indices]]] = [plans[place] for place in self.order]  # [clients][steps][accumulation][batch]
        starts = [job.start for job in self.jobs]
        frozen = [name for name in self.adapted.parameters if name not in self.jobs[0].names]
        self.trained = Stacked(starts, self.jobs[0].names, self.device, train=True)
        self.cohort = Cohort(
            {**self.trained.tensors, **Stacked(starts, frozen, self.device, train=False).tensors}, self._scalings(), self._merge_shared()
        )
        self.generators = [torch.Generator(self.device).manual_seed(dropout_seed(self.config, job)) for job in self.jobs]

    def _scalings(self) -> dict[str, torch.Tensor]:
        import torch

        found = {}
        for pair in self.adapted.layout().pairs:
            s = [pair.scaling(len(job.start[pair.A])) for job in self.jobs]
            found[pair.module] = torch.tensor(s, dtype=torch.float32, device=self.device)[:, None, None]
        return found

    def _merge_shared(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Set the backbone to what all jobs have merged; the rest of each, by module, stacked."""
        merged = [{name: array for name, array in job.start.items() if name.startswith(MERGED)} for job in self.jobs]

        def everywhere(name: str) -> bool:
            mine = merged[0][name]
            return all(theirs.get(name) is mine or (name in theirs and np.array_equal(theirs[name], mine)) for theirs in merged)

        sides = {merge_names(merged_round(name), merged_module(name)) for name in merged[0]}
        shared = {name for both in sides if all(map(everywhere, both)) for name in both}
        self.adapted.backbone.set({name: merged[0][name] for name in shared})
        modules = sorted({merged_module(name) for arrays in merged for name in arrays if name not in shared})
        if strangers := set(modules) - {pair.module for pair in self.adapted.layout().pairs}:
            raise UnsuitedError(f"clients have merged their own into {min(strangers)}, which has no adapter")
        own = [{name: array for name, array in arrays.items() if name not in shared} for arrays in merged]
        return {module: self._shifts(own, module) for module in modules}

    def _shifts(self, own: Sequence[Arrays], module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """L [clients, d_out, q] and R [clients, q, d_in] of what each client alone has merged into `module`."""
        pair = next(pair for pair in self.adapted.layout().pairs if pair.module == module)
        rows, columns = self.jobs[0].start[pair.B].shape[0], self.jobs[0].start[pair.A].shape[1]
        factors: list[Arrays] = []
        for arrays in own:
            lefts = [name for name in sorted(arrays) if name.endswith(".left") and merged_module(name) == module]
            parts = [Product.of(arrays[left], arrays[left.removesuffix("left") + "right"]) for left in lefts]
            whole = Product.sum([*parts, Product(np.zeros((rows, 0)), np.zeros((0, columns)))]).compressed()
            factors.append({"L": whole.left, "R": whole.right})
        stack = Stacked(factors, ("L", "R"), self.device, train=False).tensors
        return stack["L"].values, stack["R"].values

    def run(self) -> list[Trained | Failure]:
        """Train; what came of the jobs, in the order they were given in."""
        import torch

        started = time.perf_counter()
        training = self.config.training
        steps = [len(plan) for plan in self.plans]
        schedules = np.zeros((steps[0], len(self.jobs)), np.float32)
        for seat, job in enumerate(self.jobs):
            schedules[: steps[seat], seat] = rates(self.config, len(job.data), job.round)
        self.adapted.model.train()
        values, gradients = self.trained.values, self.trained.gradients
        assert gradients is not None
        optimizer = find("stacked_optimizer", training.optimizer)(values, training.weight_decay)
        losses = torch.zeros(steps[0], len(self.jobs), device=self.device)
        with stacked(self.adapted, self.cohort):
            self._probe()
            pulls = torch.tensor([[job.proximal] for job in self.jobs], device=self.device)
            anchors = values.clone() if pulls.any() else None
            drifts = self.trained.matrix([job.drift for job in self.jobs]) if any(job.drift for job in self.jobs) else None
            multipliers = self._multipliers()
            factors = self._factors()
            before = self._randomness()
            for step in range(steps[0]):
                n = sum(count > step for count in steps)  # those who are not done come first
                gradients.zero_()
                self._backward(step, n, losses[step])
                g = gradients[:n]
                if training.max_grad_norm is not None:
                    _clip(g, training.max_grad_norm)
                if anchors is not None:
                    g.addcmul_(values[:n] - anchors[:n], pulls[:n])
                for name, M in multipliers.items():
                    own = self.trained.view(g, name)
                    own.copy_(own @ M[:n])
                if drifts is not None:
                    g.add_(drifts[:n])
                optimizer.step(values[:n], g, torch.from_numpy(schedules[step, :n, None]).to(self.device) * factors)
            if self._randomness() != before:
                raise UnsuitedError("the model draws random numbers of its own")
        return self._ended(losses.cpu().numpy(), steps, time.perf_counter() - started)

    def _multipliers(self) -> dict[str, torch.Tensor]:
        """What the gradients of some tensors are multiplied by from the right, [clients, columns, columns]."""
        import torch

        names = self.jobs[0].rules.multipliers
        return {name: torch.from_numpy(np.stack([job.rules.multipliers[name] for job in self.jobs])).to(self.device) for name in names}

    def _factors(self) -> torch.Tensor:
        """What the learning rate of each number is multiplied by, [1, numbers], or [1, 1] where it is 1 for all."""
        import torch

        given = self.jobs[0].rules.factors
        factors = torch.ones(1, self.trained.width if given else 1, device=self.device)
        for name, factor in given.items():
            self.trained.view(factors, name).fill_(factor)
        return factors

    def _backward(self, step: int, n: int, losses: torch.Tensor) -> None:
        """Add up the gradients and losses of a step of the first `n` clients."""
        for part in range(max(len(self.plans[seat][step]) for seat in range(n))):
            for pool in pools(self._batches(step, part, n), self.pool_tokens):
                for one_pass in cut(pool, self.pass_tokens):
                    loss = self._forward(one_pass)
                    loss.sum().backward()  # type: ignore[no-untyped-call]
                    losses.index_add_(0, self.cohort.seats, loss.detach())

    def _batches(self, step: int, part: int, n: int) -> Iterator[Batch]:
        """The `part`-th batch of a step of each of the first `n` clients that has so many."""
        for seat in range(n):
            plan, data = self.plans[seat][step], self.jobs[seat].data
            if part < len(plan):
                rows = plan[part]
                masks = Masks(self.generators[seat], len(rows), max(length(data, int(row)) for row in rows))
                yield Batch(seat, data, rows, 1.0 / sum(len(rows) for rows in plan), masks)

    def _forward(self, one_pass: Pass) -> torch.Tensor:
        """Each row's share of its client's loss, [rows]."""
        import torch

        inputs, labels = one_pass.tensors(self.adapted.base.tokenizer, self.device)
        longest = inputs["input_ids"].shape[1]
        self.cohort.sit(one_pass.seats(), longest, self.device)
        spans, start = [], 0
        for part in one_pass.parts:
            spans.append(Span(part.batch.masks, part.chosen, start))
            start = spans[-1].stop
        with Dropouts(spans, longest).mode():
            logits = self.adapted.model(**inputs).logits
        loss: torch.Tensor = self.task.loss(logits, labels)
        return loss * torch.tensor(one_pass.shares(), device=self.device)

    def _probe(self) -> None:
        """Send one row through the model, to see that it can be done and how much may be done at once."""
        import torch

        longest, seat = max((len(tokens["input_ids"]), -seat) for seat, job in enumerate(self.jobs) for tokens in job.data.inputs)
        data = self.jobs[-seat].data
        row = next(row for row in range(len(data)) if length(data, row) == longest)
        masks = Masks(torch.Generator(self.device).manual_seed(0), 1, longest)
        before = self._randomness()
        with memory.counted([*self.adapted.model.parameters(), *(own.values for own in self.cohort.tensors.values())]) as kept:
            loss = self._forward(Pass((Rows(Batch(-seat, data, np.array([row]), 1.0, masks), [0]),))).sum()
        if self._randomness() != before:
            raise UnsuitedError("the model draws random numbers of its own")
        loss.backward()  # type: ignore[no-untyped-call]
        if untouched := [name for name, own in self.trained.tensors.items() if not own.reached]:
            raise UnsuitedError(f"{untouched[0]} gets no gradient")
        fit = memory.tokens_at_once(self.config.training, self.device, kept() / longest)
        self.pass_tokens = max(longest, fit // self.divisor)
        drawn = sum(mask.nbytes for mask in masks.drawn)
        self.pool_tokens = memory.tokens_with_masks(self.config.training, self.device, drawn / longest, self.pass_tokens)

    def _randomness(self) -> bytes:
        """The state of torch's own generators: it changes when a model draws numbers that no client's generator gave."""
        import torch

        state = torch.get_rng_state().numpy().tobytes()
        return state + torch.cuda.get_rng_state(self.device).numpy().tobytes() if self.device.startswith("cuda") else state

    def _ended(self, losses: np.ndarray[Any, Any], steps: Sequence[int], seconds: float) -> list[Trained | Failure]:
        """Each job's arrays and loss, and its share of the time, by rows."""
        rows = [sum(len(rows) for parts in plan for rows in parts) for plan in self.plans]
        ended: dict[int, Trained | Failure] = {}
        for seat, place in enumerate(self.order):
            loss = float(losses[: steps[seat], seat].mean())
            ended[place] = Trained(self.trained.read(seat), loss, steps[seat], seconds * rows[seat] / sum(rows))
        return [ended[place] for place in range(len(ended))]


def _clip(gradients: torch.Tensor, norm: float) -> None:
    """Scale each client's gradient down to `norm`, as torch does for one."""
    gradients.mul_((norm / (gradients.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1.0))
