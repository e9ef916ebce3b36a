"""The only client code: a list of assignments in, an answer to each out. One assignment over a network, a cohort in simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft import arrays, wire
from fedpeft.adapters.adapted import Adapted
from fedpeft.client.node import Node
from fedpeft.config import Config
from fedpeft.lookup import find
from fedpeft.records import Arrays, Assignment, Failure, Metrics, Update, merged_round
from fedpeft.strategies.strategy import Round, Strategy
from fedpeft.training import evaluate
from fedpeft.training.job import Job


class Worker:
    """A base with an adapter, kept loaded, and the nodes it works for."""

    def __init__(self, config: Config, adapted: Adapted, task: Any, strategy: Strategy, nodes: Mapping[int, Node]) -> None:
        self.config = config
        self.adapted = adapted
        self.task = task
        self.strategy = strategy
        self.nodes = nodes
        self.engine = find("engine", config.training.engine)
        self.survey = find("head_init", config.training.head_init)()
        self.layout = adapted.layout()
        self.drawn = adapted.read()  # from the seed, like everybody's
        self.merged: Arrays = {}  # what was merged into the backbone so far, the same for all clients

    @property
    def base(self) -> str:
        """Fingerprint of the base this worker trains on."""
        return self.adapted.base.fingerprint

    def answer(self, assignments: Sequence[Assignment]) -> list[Update | Failure]:
        """Do what is asked, in the order asked. What breaks is a Failure with its reason, and the rest goes on."""
        for assignment in assignments:
            self._keep_merged(assignment)
        refused = {id(a): refusal for a in assignments if (refusal := self._refused(a))}
        trained = iter(self._train([a for a in assignments if a.action == wire.TRAIN and id(a) not in refused]))
        return [refused.get(id(a)) or (next(trained) if a.action == wire.TRAIN else self._survey(a)) for a in assignments]

    def _train(self, assignments: Sequence[Assignment]) -> list[Update | Failure]:
        jobs = [self._job(assignment) for assignment in assignments]
        validated = [self._validate(job.start, self.nodes[job.client]) for job in jobs]
        answers: list[Update | Failure] = []
        for job, metrics, trained in zip(jobs, validated, self.engine(self.adapted, self.task, self.config, jobs), strict=True):
            if isinstance(trained, Failure):
                answers.append(trained)
            else:
                metrics = {"loss": trained.loss, **metrics}
                answers.append(Update(job.round, job.client, trained.arrays, len(job.data), metrics, trained.seconds))
        return answers

    def _job(self, assignment: Assignment) -> Job:
        at = Round(assignment.round, self.config.strategy.num_rounds, self.layout, self.config.seed)
        names = self.strategy.trains(self.adapted.trained, at)
        start = {**self.drawn, **self.merged, **assignment.arrays}
        return Job(assignment.client, assignment.round, start, names, self.nodes[assignment.client].train, self.strategy.proximal(at))

    def _refused(self, assignment: Assignment) -> Failure | None:
        """What does not travel must be what the server has: the digest of the tensors this client holds is checked."""
        held = {name: array for name, array in {**self.drawn, **self.merged}.items() if name not in assignment.arrays}
        mine = arrays.digest(held) if held else ""
        if mine == assignment.held:
            return None
        said = f"holds other frozen tensors than the server (digest {mine[:16] or 'none'}, there {assignment.held[:16] or 'none'})"
        return Failure(assignment.round, assignment.client, f"other seed, library or history: {said}")

    def _keep_merged(self, assignment: Assignment) -> None:
        """Remember merges for the rounds to come; those of a round that is being played again are forgotten."""
        kept = {name: array for name, array in self.merged.items() if merged_round(name) < assignment.round}
        self.merged = kept | {name: array for name, array in assignment.arrays.items() if merged_round(name) >= 0}

    def _validate(self, received: Arrays, node: Node) -> Metrics:
        """The received model on the client's own validation examples, if it keeps any."""
        if node.validation is None:
            return {}
        batch_size = self.config.training.per_device_eval_batch_size
        metrics = evaluate.evaluate(self.adapted, self.task, received, node.validation, batch_size)
        return {f"validation_{name}": value for name, value in metrics.items()}

    def _survey(self, assignment: Assignment) -> Update | Failure:
        """Answer the survey of the config, and no other: a server cannot ask for sums that the client did not agree to."""
        if not self.survey.asks or assignment.action != self.config.training.head_init:
            return Failure(assignment.round, assignment.client, f"asked for something else than agreed: {assignment.action[:50]}")
        node = self.nodes[assignment.client]
        self.adapted.write({**self.drawn, **self.merged, **assignment.arrays})
        try:
            sums = self.survey.measure(self.adapted, node.train, self.config.training.per_device_eval_batch_size)
        except (RuntimeError, ValueError, IndexError, ArithmeticError) as error:
            return Failure(assignment.round, assignment.client, f"survey broke: {error}")
        return Update(assignment.round, assignment.client, sums, len(node.train))
