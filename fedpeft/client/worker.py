"""The only client code: a list of assignments in, an answer to each out. One assignment over a network, a cohort in simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft import wire
from fedpeft.adapters.adapted import Adapted
from fedpeft.client.node import Node
from fedpeft.config import Config
from fedpeft.lookup import find
from fedpeft.records import Arrays, Assignment, Failure, Metrics, Update
from fedpeft.strategies.strategy import Strategy
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

    @property
    def base(self) -> str:
        """Fingerprint of the base this worker trains on."""
        return self.adapted.base.fingerprint

    def answer(self, assignments: Sequence[Assignment]) -> list[Update | Failure]:
        """Do what is asked, in the order asked. What breaks is a Failure with its reason, and the rest goes on."""
        trained = iter(self._train([a for a in assignments if a.action == wire.TRAIN]))
        return [next(trained) if a.action == wire.TRAIN else self._survey(a) for a in assignments]

    def _train(self, assignments: Sequence[Assignment]) -> list[Update | Failure]:
        jobs = [Job(a.client, a.round, a.arrays, self.nodes[a.client].train) for a in assignments]
        validated = [self._validate(a.arrays, self.nodes[a.client]) for a in assignments]
        upload = self.strategy.upload(self.adapted.trained)
        answers: list[Update | Failure] = []
        for job, metrics, trained in zip(jobs, validated, self.engine(self.adapted, self.task, self.config, jobs), strict=True):
            if isinstance(trained, Failure):
                answers.append(trained)
                continue
            arrays = {name: trained.arrays[name] for name in upload}
            answers.append(Update(job.round, job.client, arrays, len(job.data), {"loss": trained.loss, **metrics}, trained.seconds))
        return answers

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
        self.adapted.write(assignment.arrays)
        try:
            sums = self.survey.measure(self.adapted, node.train, self.config.training.per_device_eval_batch_size)
        except (RuntimeError, ValueError, IndexError, ArithmeticError) as error:
            return Failure(assignment.round, assignment.client, f"survey broke: {error}")
        return Update(assignment.round, assignment.client, sums, len(node.train))
