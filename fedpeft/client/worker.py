"""The only client code: a list of assignments in, an answer to each out. One assignment over a network, a cohort in simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpeft import arrays, seeds, wire
from fedpeft.adapters.adapted import Adapted
from fedpeft.client.node import Node
from fedpeft.config import Config
from fedpeft.lookup import find
from fedpeft.records import Arrays, Assignment, Failure, Metrics, Update, merged_round
from fedpeft.strategies.strategy import Gradients, Round, Strategy, Turn
from fedpeft.training import evaluate
from fedpeft.training.gradients import full_gradients
from fedpeft.training.job import Job

BREAKS = (RuntimeError, ValueError, IndexError, ArithmeticError)  # what torch and NumPy raise, out of memory included


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
        self.memory: dict[int, Arrays] = {}  # client -> what the strategy remembers there

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
        turns = [self._turn(assignment) for assignment in assignments]
        begun = [self._begin(assignment, turn) for assignment, turn in zip(assignments, turns, strict=True)]
        jobs = [job for job in begun if isinstance(job, Job)]
        ended = iter(self.engine(self.adapted, self.task, self.config, jobs))
        answers: list[Update | Failure] = []
        for turn, job in zip(turns, begun, strict=True):
            trained = job if isinstance(job, Failure) else next(ended)
            if isinstance(trained, Failure) or isinstance(job, Failure):
                answers.append(trained)
                continue
            upload, self.memory[job.client] = self.strategy.end(turn, job.start, trained.arrays)
            metrics = {"loss": trained.loss, **self._validate(turn.received, self.nodes[job.client])}
            answers.append(Update(job.round, job.client, upload, len(job.data), metrics, trained.seconds))
        return answers

    def _turn(self, assignment: Assignment) -> Turn:
        received = {**self.drawn, **self.merged, **assignment.arrays}
        at = Round(assignment.round, self.config.strategy.num_rounds, self.layout, self.config.seed)

        def gradients(arrays: Arrays, batches: int) -> Gradients:
            data = self.nodes[assignment.client].train
            size = self.config.training.per_device_train_batch_size
            order = seeds.generator(self.config.seed, "gradient", assignment.round, assignment.client).permutation(len(data))
            rows = [order[start : start + size] for start in range(0, len(order), size)][:batches]
            return full_gradients(self.adapted, self.task, arrays, data, rows)

        return Turn(at, received, self.memory.get(assignment.client, {}), gradients)

    def _begin(self, assignment: Assignment, turn: Turn) -> Job | Failure:
        try:
            start = self.strategy.begin(turn)
        except BREAKS as error:
            return Failure(assignment.round, assignment.client, f"beginning broke: {error}")
        names = self.strategy.trains(self.adapted.trained, turn.at)
        data, mu = self.nodes[assignment.client].train, self.strategy.proximal(turn.at)
        return Job(assignment.client, assignment.round, start, names, data, mu)

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
        except BREAKS as error:
            return Failure(assignment.round, assignment.client, f"survey broke: {error}")
        return Update(assignment.round, assignment.client, sums, len(node.train))

    def memories(self) -> Arrays:
        """What all clients of this worker remember, as CLIENT/NAME: for the checkpoint of a simulation."""
        return {f"{client}/{name}": array for client, memory in self.memory.items() for name, array in memory.items()}

    def restore(self, memories: Arrays) -> None:
        """Let the clients remember what `memories` gave, and nothing else."""
        self.memory = {}
        for key, array in memories.items():
            client, _, name = key.partition("/")
            self.memory.setdefault(int(client), {})[name] = array
