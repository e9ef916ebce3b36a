"""THE round loop, over any Flower `Grid`: simulated clients in this process, or real ones behind a SuperLink.

A round: sample -> send -> receive -> validate -> combine -> apply -> evaluate -> record -> checkpoint.
Before round 1 the clients may be surveyed (`training.head_init`), and the model is evaluated as it stands: that is round 0.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from fedpeft import arrays as arithmetic
from fedpeft import wire
from fedpeft.config import Config
from fedpeft.errors import RunStopped
from fedpeft.records import Arrays, Assignment, Failure, Layout, Metrics, RoundRecord, TensorSpec, Update
from fedpeft.screen import Screen
from fedpeft.server import checkpoint, sampling, validation
from fedpeft.server.exchange import Exchange, exchange
from fedpeft.server.run_folder import RunFolder
from fedpeft.strategies.strategy import Strategy

MAX_EMPTY_ROUNDS = 3  # rounds in a row without enough accepted updates, after which a run stops


@dataclass(frozen=True)
class Survey:
    """Sums asked of every client before round 1, and what becomes of the global arrays with them."""

    action: str
    finish: Callable[[Arrays], Arrays]  # the sum of all answers -> new values for some of the global arrays


@dataclass(frozen=True)
class Federation:
    """All that the server's side of a run is made of."""

    config: Config
    strategy: Strategy
    base: str  # fingerprint of the base model
    layout: Layout
    arrays: Arrays  # the adapter and head as drawn from the seed
    trained: tuple[str, ...]
    evaluate: Callable[[Arrays], Metrics]  # on the server's test split
    primary_metric: str
    roster: Callable[[], dict[int, int]]  # client -> Flower node, of those that are there
    survey: Survey | None = None


@dataclass
class Outcome:
    """What a run came to. `stopped_because` is "finished" or says what ended it early."""

    arrays: Arrays
    state: Arrays
    records: list[RoundRecord] = field(default_factory=list)
    stopped_because: str = "finished"


@dataclass
class _Judged:
    """A round's replies after validation."""

    accepted: list[Update] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    norms: dict[str, float] = field(default_factory=dict)


def run(federation: Federation, grid: Grid, folder: RunFolder, screen: Screen) -> Outcome:
    """Play every round that `folder` does not hold yet; the result is the same however often it was interrupted."""
    config = federation.config
    kept = checkpoint.latest(folder.checkpoint)
    if kept is None:
        outcome = Outcome(federation.arrays, federation.strategy.start(federation.arrays))
        folder.records(up_to=-1)
        _finish_round(outcome, _before_training(federation, grid, outcome), folder, screen, config)
    else:
        outcome = Outcome(kept.arrays, kept.strategy, folder.records(up_to=kept.round))
        screen.note(f"resuming after round {kept.round}")
    for round in range(outcome.records[-1].round + 1, config.strategy.num_rounds + 1):
        _finish_round(outcome, _play(federation, grid, outcome, round), folder, screen, config)
        recent = outcome.records[-MAX_EMPTY_ROUNDS:]
        if len(recent) == MAX_EMPTY_ROUNDS and all(_is_empty(record, config) for record in recent):
            reasons = "; ".join(f"{reason} ({count})" for reason, count in recent[-1].rejected.items())
            outcome.stopped_because = f"no round of the last {MAX_EMPTY_ROUNDS} had enough accepted updates: {reasons}"
            break
    return outcome


def _finish_round(outcome: Outcome, record: RoundRecord, folder: RunFolder, screen: Screen, config: Config) -> None:
    """Record first, checkpoint second: a line without its checkpoint is dropped on resume, and the round is played again."""
    outcome.records.append(record)
    folder.append(record)
    checkpoint.write(folder.checkpoint, checkpoint.Checkpoint(record.round, outcome.arrays, outcome.state))
    for client, reason in record.rejected_clients.items():
        screen.note(f"round {record.round}: client {client} left out: {reason}")
    screen.round_done(record, config.strategy.num_rounds)


def _before_training(federation: Federation, grid: Grid, outcome: Outcome) -> RoundRecord:
    """Round 0: the survey, if the config asks for one, and the metrics before any training."""
    started = time.perf_counter()
    traffic, judged = Exchange([], 0, 0), _Judged()
    if federation.survey is not None:
        roster = _wait_for(federation)
        asked = [Assignment(federation.survey.action, 0, client, outcome.arrays) for client in sorted(roster)]
        traffic = exchange(grid, asked, roster, federation.base, federation.config.strategy.round_timeout)
        judged = _judge(traffic, federation, None, outcome.arrays)
        if not judged.accepted:
            reasons = "; ".join(sorted({failure.reason for failure in judged.failed}))
            raise RunStopped(f"no client answered the survey {federation.survey.action} before round 1: {reasons}")
        outcome.arrays = {**outcome.arrays, **federation.survey.finish(arithmetic.total(update.arrays for update in judged.accepted))}
    surveyed = time.perf_counter()
    metrics = federation.evaluate(outcome.arrays)
    seconds = {"exchange": surveyed - started, "evaluate": time.perf_counter() - surveyed}
    return _record(0, traffic, judged, metrics, 0.0, seconds)


def _play(federation: Federation, grid: Grid, outcome: Outcome, round: int) -> RoundRecord:
    """One round; moves the outcome's arrays and state unless too few updates were accepted."""
    settings = federation.config.strategy
    times = [time.perf_counter()]
    roster = _wait_for(federation)
    clients = sampling.choose(list(roster), settings.fraction_train, settings.min_train_nodes, federation.config.seed, round)
    received = outcome.arrays
    asked = [Assignment(wire.TRAIN, round, client, received) for client in clients]
    traffic = exchange(grid, asked, roster, federation.base, settings.round_timeout)
    times.append(time.perf_counter())
    uploaded = {name: federation.layout.tensors[name] for name in federation.strategy.upload(federation.trained)}
    judged = _judge(traffic, federation, uploaded, received)
    moved = 0.0
    if len(judged.accepted) >= settings.min_train_nodes:
        combined = federation.strategy.combine(judged.accepted, received)
        outcome.arrays, outcome.state = federation.strategy.apply(received, combined, outcome.state)
        moved = arithmetic.norm(arithmetic.difference(outcome.arrays, received))
    times.append(time.perf_counter())
    metrics = federation.evaluate(outcome.arrays) if moved else outcome.records[-1].metrics
    times.append(time.perf_counter())
    seconds = dict(zip(("exchange", "combine", "evaluate"), (end - start for start, end in zip(times, times[1:], strict=False)), strict=True))
    return _record(round, traffic, judged, metrics, moved, seconds)


def _judge(traffic: Exchange, federation: Federation, uploaded: dict[str, TensorSpec] | None, received: Arrays) -> _Judged:
    """Validate every reply. `uploaded` is None for a survey, whose answers are sums of any name and shape, all alike."""
    judged = _Judged()
    for reply in traffic.replies:
        specs = uploaded
        if specs is None and judged.accepted:
            specs = Layout.specs(judged.accepted[0].arrays)
        expected = validation.Expected(federation.base, specs, received, federation.config.strategy.max_update_norm)
        answer = validation.judge(reply, expected)
        if isinstance(answer, Update) and uploaded is not None:
            norm, reason = validation.movement(answer, expected)
            judged.norms[str(answer.client)] = norm
            answer = Failure(answer.round, answer.client, reason) if reason else answer
        if isinstance(answer, Update):
            judged.accepted.append(answer)
        else:
            judged.failed.append(answer)
    return judged


def _wait_for(federation: Federation) -> dict[int, int]:
    """The clients that are there, once there are `min_available_nodes`. Raises RunStopped when they do not come in time."""
    settings = federation.config.strategy
    ends = time.monotonic() + settings.round_timeout
    while len(roster := federation.roster()) < settings.min_available_nodes:
        if time.monotonic() > ends:
            raise RunStopped(f"{len(roster)} clients after {settings.round_timeout:.0f} s, strategy.min_available_nodes is {settings.min_available_nodes}")
        time.sleep(0.2)
    return roster


def _is_empty(record: RoundRecord, config: Config) -> bool:
    return record.round > 0 and record.accepted < config.strategy.min_train_nodes


def _record(round: int, traffic: Exchange, judged: _Judged, metrics: Metrics, moved: float, seconds: dict[str, float]) -> RoundRecord:
    examples = sum(update.examples for update in judged.accepted)
    return RoundRecord(
        round=round,
        asked=len(traffic.replies),
        accepted=len(judged.accepted),
        rejected=dict(sorted(Counter(failure.reason.split(":")[0] for failure in judged.failed).items())),
        rejected_clients={str(failure.client): failure.reason for failure in judged.failed},
        loss=_mean("loss", judged.accepted),
        metrics=metrics,
        examples=examples,
        bytes_up=traffic.bytes_up,
        bytes_down=traffic.bytes_down,
        update_norm=moved,
        client_update_norms=judged.norms,
        seconds=seconds,
        report={f"clients_{name}": mean for name in _names(judged.accepted) if (mean := _mean(name, judged.accepted)) is not None},
    )


def _names(updates: Sequence[Update]) -> list[str]:
    """Metrics other than the training loss that every accepted client gave."""
    return sorted(set.intersection(*(set(update.metrics) for update in updates)) - {"loss"}) if updates else []


def _mean(name: str, updates: Sequence[Update]) -> float | None:
    """The n_k-weighted mean of a client metric, or None when nobody gave it."""
    given = [(update.examples, update.metrics[name]) for update in updates if name in update.metrics]
    return sum(n * value for n, value in given) / sum(n for n, _ in given) if given else None
