"""The only client code: a list of assignments in, an answer to each out. One assignment over a network, a cohort in simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedpeft import arrays, seeds, wire
from fedpeft.adapters.adapted import Adapted
from fedpeft.client.node import Node
from fedpeft.config import Config
from fedpeft.lookup import TABLES, find
from fedpeft.privacy.guard import Guard
from fedpeft.records import Arrays, Assignment, Failure, Metrics, Update, all_finite, merged_round
from fedpeft.strategies.strategy import Gradients, Round, Strategy, Turn
from fedpeft.training import evaluate, memory
from fedpeft.training.gradients import full_gradients
from fedpeft.training.job import BREAKS, Job, Trained, step_sizes

FEWEST, MOST = 32, 256  # clients of a cohort
NOT_FINITE = "not finite: a tensor (did the training diverge? lower training.learning_rate)"


class Worker:
    """A base with an adapter, kept loaded, and the nodes it works for. `surveys` are those it agrees to, by their action."""

    def __init__(
        self,
        config: Config,
        adapted: Adapted,
        task: Any,
        strategy: Strategy,
        nodes: Mapping[int, Node],
        surveys: Mapping[str, Any],
        clients: int,
        guards: Mapping[int, Guard] | None = None,
    ) -> None:
        self.config = config
        self.adapted = adapted
        self.task = task
        self.strategy = strategy
        self.nodes = nodes
        self.surveys = surveys
        self.guards = guards or {}  # of the clients' privacy; none where the config asks for none
        self.clients = clients  # of the whole federation
        self.engine = find("engine", config.training.engine)
        named = config.training.engine
        self.evaluation = find("evaluation", named) if named in TABLES["evaluation"] else evaluate.each
        self.layout = adapted.layout()
        self.drawn = adapted.read()  # from the seed, like everybody's
        self.kept: Arrays = {}  # what is sent but once: merges into the backbone, and tensors that do not change any more
        self.memory: dict[int, Arrays] = {}  # client -> what the strategy remembers there

    @property
    def base(self) -> str:
        """Fingerprint of the base this worker trains on."""
        return self.adapted.base.fingerprint

    @property
    def cohort(self) -> int:
        """How many clients are best asked together: as many as the engine trains at once, or a small multiple; memory needs a bound."""
        numbers = sum(array.size for array in self.drawn.values())
        at_once = memory.clients_at_once(self.config.training, self.adapted.base.device, numbers)
        return min(at_once, MOST) if at_once >= FEWEST else at_once * -(-FEWEST // at_once)

    def answer(self, assignments: Sequence[Assignment]) -> list[Update | Failure]:
        """Do what is asked, in the order asked. What breaks is a Failure with its reason, and the rest goes on."""
        for assignment in assignments:
            self.keep(assignment)
        refused = {id(a): refusal for a in assignments if (refusal := self._refused(a))}
        trained = iter(self._train([a for a in assignments if a.action == wire.TRAIN and id(a) not in refused]))
        return [refused.get(id(a)) or (next(trained) if a.action == wire.TRAIN else self._other(a)) for a in assignments]

    def _train(self, assignments: Sequence[Assignment]) -> list[Update | Failure]:
        turns = [self._turn(assignment) for assignment in assignments]
        begun = [self._begin(assignment, turn) for assignment, turn in zip(assignments, turns, strict=True)]
        jobs = [job for job in begun if isinstance(job, Job)]
        ended = iter(self.engine(self.adapted, self.task, self.config, jobs))
        came = [job if isinstance(job, Failure) else next(ended) for job in begun]
        whole = [(turn, job.client) for turn, job, trained in zip(turns, begun, came, strict=True) if isinstance(trained, Trained)]
        validated = iter(self._validate(whole))
        answers: list[Update | Failure] = []
        for turn, job, trained in zip(turns, begun, came, strict=True):
            epsilon = self._spent(job.client)
            if isinstance(trained, Failure) or isinstance(job, Failure):
                answers.append(replace(trained, epsilon=epsilon))
                continue
            metrics = next(validated)
            metrics |= {"loss": trained.loss} if trained.loss is not None else {}
            metrics |= {"epsilon": epsilon} if epsilon is not None else {}
            metrics |= {"fell_back": 1.0} if trained.fell_back else {}
            upload, memory = self.strategy.end(turn, job.start, trained.arrays)
            if reason := self._unbelievable(turn, upload, memory):  # such a turn is not remembered: the next would begin from it
                answers.append(Failure(job.round, job.client, reason, epsilon))
                continue
            self.memory[job.client] = memory
            answers.append(Update(job.round, job.client, upload, len(job.data), metrics, trained.seconds))
        return answers

    def _unbelievable(self, turn: Turn, upload: Arrays, memory: Arrays) -> str | None:
        """Why a server would not take the upload, if it would not."""
        if not (all_finite(upload) and all_finite(memory)):
            return NOT_FINITE
        return arrays.beyond(arrays.movement(upload, turn.received), self.config.strategy.max_update_norm)

    def _spent(self, client: int) -> float | None:
        """Epsilon of all that the client has released; None where nothing is promised."""
        epsilon = self.guards[client].epsilon() if client in self.guards else math.inf
        return epsilon if math.isfinite(epsilon) else None

    def _turn(self, assignment: Assignment) -> Turn:
        received = {**self.drawn, **self.kept, **assignment.arrays}
        layout = self.layout
        if layout.pairs and (r := len(received[layout.pairs[0].A])) != layout.tensors[layout.pairs[0].A].shape[0]:
            layout = layout.cut(r)
        at = Round(assignment.round, self.config.strategy.num_rounds, layout, self.config.seed, self.clients)
        data = self.nodes[assignment.client].train

        def gradients(arrays: Arrays, batches: int) -> Gradients:
            size = self.config.training.per_device_train_batch_size
            order = seeds.generator(self.config.seed, "gradient", assignment.round, assignment.client).permutation(len(data))
            rows = [order[start : start + size] for start in range(0, len(order), size)][:batches]
            return full_gradients(self.adapted, self.task, arrays, data, rows)

        steps = step_sizes(self.config, len(data), assignment.round)
        return Turn(at, received, self.memory.get(assignment.client, {}), gradients, steps)

    def _begin(self, assignment: Assignment, turn: Turn) -> Job | Failure:
        try:
            start, drift = self.strategy.begin(turn), self.strategy.drift(turn)
            guard = self.guards.get(assignment.client)
            if guard is not None and (refusal := guard.refusal()):
                return Failure(assignment.round, assignment.client, refusal)
            private = guard.begin(assignment.round) if guard is not None else None
        except BREAKS as error:
            return Failure(assignment.round, assignment.client, f"beginning broke: {error}")
        adapter = self.adapted.adapter
        resting = adapter.resting(turn.at.layout, turn.received)
        names = self.strategy.trains([name for name in self.adapted.trained if name not in resting], turn.at)
        return Job(
            assignment.client,
            assignment.round,
            start,
            names,
            self.nodes[assignment.client].train,
            proximal=self.strategy.proximal(turn.at),
            tail=self.strategy.tail(turn.at),
            private=private,
            drift=drift,
            rules=adapter.rules(turn.at.layout, start),
        )

    def _refused(self, assignment: Assignment) -> Failure | None:
        """What does not travel must be what the server has: the digest of the tensors this client holds is checked."""
        if assignment.action == wire.SECOND:  # a question about the round whose assignment was checked
            return None
        held = {name: array for name, array in {**self.drawn, **self.kept}.items() if name not in assignment.arrays}
        mine = arrays.digest(held) if held else ""
        if mine == assignment.held:
            return None
        said = f"holds other frozen tensors than the server (digest {mine[:16] or 'none'}, there {assignment.held[:16] or 'none'})"
        return Failure(assignment.round, assignment.client, f"other seed, library or history: {said}")

    def keep(self, assignment: Assignment) -> None:
        """Remember, for the rounds to come, what is sent but once; merges of a round that is being played again are forgotten."""
        at = Round(assignment.round, self.config.strategy.num_rounds, self.layout, self.config.seed, self.clients)
        resting = self.adapted.adapter.resting(self.layout, {**self.drawn, **self.kept, **assignment.arrays})
        once = self.drawn.keys() - set(self.strategy.sends([name for name in self.drawn if name not in resting], at))
        kept = {name: array for name, array in self.kept.items() if merged_round(name) < assignment.round}
        self.kept = kept | {name: array for name, array in assignment.arrays.items() if merged_round(name) >= 0 or name in once}

    def _validate(self, whole: Sequence[tuple[Turn, int]]) -> list[Metrics]:
        """The model of each client, as it was before it trained, on the client's own validation examples, if it keeps any."""
        kept = [(turn, data) for turn, client in whole if (data := self.nodes[client].validation) is not None]
        models = [(self.strategy.own(turn), data) for turn, data in kept]
        found = iter(self.evaluation(self.adapted, self.task, models, self.config.training) if models else ())
        measured: list[Metrics] = [next(found) if self.nodes[client].validation is not None else {} for _, client in whole]
        return [{f"validation_{name}": value for name, value in metrics.items()} for metrics in measured]

    def _other(self, assignment: Assignment) -> Update | Failure:
        """A second question of the round, or a survey that the config agrees to; a server cannot ask for anything else."""
        try:
            if assignment.action == wire.SECOND:
                arrays = self.strategy.answer(self._turn(assignment), assignment.arrays)
            elif assignment.action in self.surveys:
                arrays = self._measure(assignment)
            else:
                return Failure(assignment.round, assignment.client, f"asked for something else than agreed: {assignment.action[:50]}")
        except KeyError as error:
            return Failure(assignment.round, assignment.client, f"missing memory: {error} is not there; was the client started anew?")
        except BREAKS as error:
            return Failure(assignment.round, assignment.client, f"{assignment.action[:50]} broke: {error}")
        return Update(assignment.round, assignment.client, arrays, len(self.nodes[assignment.client].train))

    def _measure(self, assignment: Assignment) -> Arrays:
        self.adapted.write({**self.drawn, **self.kept, **assignment.arrays})
        sums: Arrays = self.surveys[assignment.action].measure(
            self.adapted, self.task, self.nodes[assignment.client].train, self.config.training
        )
        return sums

    def memories(self) -> Arrays:
        """What all clients of this worker remember, as CLIENT/NAME: for the checkpoint of a simulation."""
        return {f"{client}/{name}": array for client, memory in self.memory.items() for name, array in memory.items()}

    def restore(self, memories: Arrays) -> None:
        """Let the clients remember what `memories` gave, and nothing else."""
        self.memory = {}
        for key, array in memories.items():
            client, _, name = key.partition("/")
            self.memory.setdefault(int(client), {})[name] = array
