"""THE round loop, over any Flower `Grid`: simulated clients in this process, or real ones behind a SuperLink.

A round: sample -> send -> receive -> validate -> combine -> apply -> evaluate -> record -> checkpoint.
Of many clients (more than HELD) the updates are combined as they come, and dropped, where the strategy needs no more than sums.
Before round 1 the clients may be surveyed (`training.head_init`), and the model is evaluated as it stands: that is round 0.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

from flwr.serverapp import Grid

from fedpeft import arrays as arithmetic
from fedpeft import wire
from fedpeft.errors import Problem, RunStopped, UserError
from fedpeft.privacy.guard import SPENT
from fedpeft.products import Product
from fedpeft.records import MERGED, Arrays, Assignment, Metrics, RoundRecord, Update
from fedpeft.screen import Screen
from fedpeft.server import checkpoint, sampling
from fedpeft.server.asking import Judged, assign, judge
from fedpeft.server.combining import Turnout, combine_as_they_come, combine_together
from fedpeft.server.exchange import Exchange
from fedpeft.server.federation import Federation, Outcome
from fedpeft.server.private_round import private_round
from fedpeft.server.run_folder import RunFolder
from fedpeft.strategies.strategy import Combined

MAX_EMPTY_ROUNDS = 3  # rounds in a row without enough accepted updates, after which a run stops
HELD = 32  # updates that may be at hand at once; of more, a strategy that streams sees each once, and estimates its report
LISTED = 100  # clients that a record lists one by one: those whose updates went farthest, and as many of those left out
NOTED = 10  # clients left out that a person is told of, a line each


def run(federation: Federation, grid: Grid, folder: RunFolder, screen: Screen) -> Outcome:
    """Play every round that `folder` does not hold yet; the result is the same however often it was interrupted."""
    outcome = _resumed(federation, folder)
    if outcome is None:
        outcome = Outcome(federation.arrays, federation.strategy.start(federation.arrays))
        folder.records(up_to=-1)
        _finish_round(federation, outcome, _before_training(federation, grid, outcome), folder, screen)
    else:
        screen.note(f"resuming after round {outcome.records[-1].round}")
    for round in range(outcome.records[-1].round + 1, federation.config.strategy.num_rounds + 1):
        if _is_stuck(outcome, federation) or _is_spent(outcome, federation) or (federation.curator and federation.curator.refusal()):
            break
        _finish_round(federation, outcome, _play(federation, grid, outcome, round), folder, screen)
    unplayed = outcome.records[-1].round < federation.config.strategy.num_rounds
    if unplayed and federation.curator and (refusal := federation.curator.refusal()):
        outcome.stopped_because = refusal
    elif _is_spent(outcome, federation):
        outcome.stopped_because = f"{SPENT}: no client can afford another round of epsilon"
    elif _is_stuck(outcome, federation):
        last = outcome.records[-1]
        reasons = "; ".join(f"{reason} ({count})" for reason, count in last.rejected.items()) or f"{last.asked} clients were asked"
        outcome.stopped_because = f"too few updates were accepted, last time in round {last.round}: {reasons}"
    return outcome


def _resumed(federation: Federation, folder: RunFolder) -> Outcome | None:
    """The run in `folder` after its last whole round, or None when there is none. Raises UserError when it was another run."""
    kept = checkpoint.latest(folder.checkpoint)
    if kept is None:
        return None
    for what, then, now in (("base model", kept.base, federation.base), ("data", kept.data, federation.data)):
        if then != now:
            raise UserError(
                Problem("--resume", f"the run was started with another {what} (fingerprint {then}, now {now})", do="start a new run")
            )
    records = folder.records(up_to=kept.round)
    if [record.round for record in records] != list(range(kept.round + 1)):
        raise UserError(
            Problem("--resume", f"{folder.rounds} has lost rounds: {len(records)} of {kept.round + 1} are there", do="start a new run")
        )
    _check_ledgers(federation, records)
    federation.restore(kept.clients)
    return Outcome(kept.arrays, kept.strategy, records, spent=set(kept.spent))


def _check_ledgers(federation: Federation, records: Sequence[RoundRecord]) -> None:
    """A ledger that lost its end, or itself, follows from nothing wrong; but the rounds on record have cost more than it says."""
    stated = max((record.epsilon for record in records if record.epsilon is not None), default=0.0)
    spent = (federation.privacy() or {}).get("epsilon_if_noise_were_secret")
    if spent is not None and spent < stated * (1 - 1e-9):
        got = f"the ledgers add up to epsilon {spent:.4g}, and round {records[-1].round} had reached {stated:.4g}: they have lost lines"
        raise UserError(Problem("--resume", got, do="put the folder ledger back as it was; without it no epsilon can be stated"))


def _finish_round(federation: Federation, outcome: Outcome, record: RoundRecord, folder: RunFolder, screen: Screen) -> None:
    """Record first, checkpoint second: a line without its checkpoint is dropped on resume, and the round is played again."""
    outcome.records.append(record)
    known = (federation.memories(), federation.base, federation.data, frozenset(outcome.spent))
    whole = checkpoint.Checkpoint(record.round, outcome.arrays, outcome.state, *known)
    try:
        folder.append(record)
        checkpoint.write(folder.checkpoint, whole)
    except OSError as error:
        do = "make room, and go on after the round before with --resume"
        raise RunStopped(f"round {record.round} cannot be written to {folder.path} ({error.strerror}); {do}") from error
    for client, reason in list(record.rejected_clients.items())[:NOTED]:
        screen.note(f"round {record.round}: client {client} left out: {reason}")
    if (more := sum(record.rejected.values()) - NOTED) > 0:
        screen.note(f"round {record.round}: {more:,} more clients left out, see {folder.rounds}")
    screen.round_done(record, federation.config.strategy.num_rounds)


def _before_training(federation: Federation, grid: Grid, outcome: Outcome) -> RoundRecord:
    """Round 0: the surveys, if there are any, and the metrics before any training."""
    started = time.perf_counter()
    traffic, judged = Exchange(grid, [], {}, federation.base, 0.0), Judged()
    for survey in federation.surveys:
        roster = _wait_for(federation)
        asked = assign(federation, survey.action, sorted(roster), outcome, 0)
        traffic, judged = _asking(federation, grid, roster)(asked.assignments).after(traffic), Judged()
        answers = judge(traffic, federation, lambda client, survey=survey: survey.expects, judged)  # type: ignore[misc]
        sums = arithmetic.total(answer.arrays for answer in answers)
        if not judged.accepted:
            reasons = "; ".join(sorted({failure.reason for failure in judged.failed})[:NOTED])
            raise RunStopped(f"no client answered the survey {survey.action} before round 1: {reasons}")
        outcome.arrays = {**outcome.arrays, **survey.finish(sums)}
    surveyed = time.perf_counter()
    metrics = federation.evaluate(outcome.arrays)
    seconds = {"exchange": surveyed - started, "evaluate": time.perf_counter() - surveyed}
    return _record(0, traffic, judged, metrics, 0.0, seconds, {})


def _play(federation: Federation, grid: Grid, outcome: Outcome, round: int) -> RoundRecord:
    """One round; moves the outcome's arrays and state unless too few updates were accepted."""
    settings = federation.config.strategy
    started = time.perf_counter()
    roster = _wait_for(federation)
    private = private_round(federation, round)
    if private is not None:
        clients = private.sample(roster)
    else:
        able = [client for client in roster if client not in outcome.spent]
        clients = sampling.choose(able, settings.fraction_train, settings.min_train_nodes, federation.config.seed, round)
    received, at = outcome.arrays, federation.at(round)
    asked = assign(federation, wire.TRAIN, clients, outcome, round)
    ask = _asking(federation, grid, roster)
    traffic, judged = ask(asked.assignments), Judged()
    trained = federation.trains(received)
    arriving = judge(
        traffic, federation, lambda client: federation.strategy.uploads(trained, federation.at(round, client)), judged, received
    )
    turnout = Turnout(federation, received, at, traffic, judged, ask)
    combined: Combined | None
    if private is not None:
        released = private.release(arriving, received, federation, outcome.state)
        combined, answered = federation.strategy.combine(released, received, at), judged
    elif federation.strategy.streams and len(clients) > HELD:
        combined, answered = combine_as_they_come(turnout, arriving), judged
    else:
        combined, answered = combine_together(turnout, list(arriving))
    outcome.spent |= {failure.client for failure in judged.failed if failure.reason.startswith(SPENT)}
    outcome.seen |= {update.client: round - 1 for update in judged.accepted}
    for failure in judged.failed:  # it may have lost what it was sent: the next time it is sent everything
        outcome.seen.pop(failure.client, None)
    moved, said = 0.0, {}
    if combined is not None and len(answered.accepted) >= federation.fewest:
        applied, state = federation.strategy.apply(received, combined.arrays, outcome.state)
        outcome.state = state if private is None else state | private.state
        outcome.arrays = federation.settle(applied)
        said = combined.report
        moved = _moved(received, outcome.arrays)
    combining = time.perf_counter() - started - answered.seconds
    metrics = federation.evaluate(outcome.arrays) if moved else outcome.records[-1].metrics
    if federation.ranks:
        said = {**said, "left_out_by_rank": sum(asked.left_out.values()) / len(asked.left_out)}
    evaluating = time.perf_counter() - started - answered.seconds - combining
    seconds = {"exchange": answered.seconds, "combine": combining, "evaluate": evaluating}
    record = _record(round, traffic, answered, metrics, moved, seconds, said)
    return record if private is None else private.censored(record)


def _asking(federation: Federation, grid: Grid, roster: dict[int, int]) -> Callable[[Sequence[Assignment]], Exchange]:
    """What sends assignments to clients at their nodes in `roster`, and gives the traffic with their replies."""
    timeout = federation.config.strategy.round_timeout
    return lambda assignments: Exchange(grid, assignments, roster, federation.base, timeout, federation.roster)


def _moved(before: Arrays, after: Arrays) -> float:
    """Euclidean norm of the move of the global state: of its tensors, and of what was newly merged into the backbone."""
    tensors = arithmetic.norm(arithmetic.difference({name: after[name] for name in before}, before))
    lefts = [name for name in after if name not in before and name.startswith(MERGED) and name.endswith(".left")]
    merged = [Product.of(after[left], after[left.removesuffix("left") + "right"]).norm() for left in lefts]
    return math.hypot(tensors, *merged)


def _wait_for(federation: Federation) -> dict[int, int]:
    """The clients that are there, once there are `min_available_nodes`. Raises RunStopped when they do not come in time."""
    settings = federation.config.strategy
    ends = time.monotonic() + settings.round_timeout
    while len(roster := federation.roster()) < settings.min_available_nodes:
        if time.monotonic() > ends:
            waited, wanted = f"{settings.round_timeout:.0f} s", settings.min_available_nodes
            raise RunStopped(f"{len(roster)} clients after {waited}, strategy.min_available_nodes is {wanted}")
        time.sleep(wire.POLL_SECONDS)
    return roster


def _is_stuck(outcome: Outcome, federation: Federation) -> bool:
    """The last rounds, or all of a shorter run, had too few accepted updates to move anything.

    Never where whole clients are private: nobody may learn from a run's end who took part.
    """
    if federation.curator is not None:
        return False
    trained = [record for record in outcome.records if record.round > 0]
    num_rounds = federation.config.strategy.num_rounds
    recent = trained[-min(MAX_EMPTY_ROUNDS, num_rounds) :]
    empty = [record for record in recent if record.accepted < federation.fewest or (record.asked and not record.accepted)]
    return len(empty) == min(MAX_EMPTY_ROUNDS, num_rounds)


def _is_spent(outcome: Outcome, federation: Federation) -> bool:
    """Every client that is there has said that its privacy budget allows no further round."""
    return bool(outcome.spent) and set(federation.roster()) <= outcome.spent


def _record(
    round: int, traffic: Exchange, judged: Judged, metrics: Metrics, moved: float, seconds: dict[str, float], said: Metrics
) -> RoundRecord:
    examples = sum(update.examples for update in judged.accepted)
    return RoundRecord(
        round=round,
        asked=len(traffic.assignments),
        accepted=len(judged.accepted),
        rejected=dict(sorted(Counter(failure.reason.split(":")[0] for failure in judged.failed).items())),
        rejected_clients={str(failure.client): failure.reason for failure in judged.failed[:LISTED]},
        loss=_training_loss(judged.accepted),
        metrics=metrics,
        examples=examples,
        bytes_up=traffic.bytes_up,
        bytes_down=traffic.bytes_down,
        update_norm=moved,
        client_update_norms=_farthest(judged.norms),
        seconds=seconds,
        epsilon=max(_spent(judged), default=None),
        report={**said, **_client_means(judged.accepted)},
    )


def _spent(judged: Judged) -> list[float]:
    """What clients say that they have spent, whether their updates were taken or not: they were seen."""
    accepted = [update.metrics["epsilon"] for update in judged.accepted if "epsilon" in update.metrics]
    return accepted + [failure.epsilon for failure in judged.failed if failure.epsilon is not None]


def _farthest(norms: dict[str, float]) -> dict[str, float]:
    """The largest of many, in the order of clients."""
    if len(norms) <= LISTED:
        return norms
    kept = set(sorted(norms, key=lambda client: (-norms[client], int(client)))[:LISTED])
    return {client: norm for client, norm in norms.items() if client in kept}


def _training_loss(updates: Sequence[Update]) -> float | None:
    """The n_k-weighted mean of the clients' training losses, or None when nobody gave one."""
    given = [(update.examples, update.metrics["loss"]) for update in updates if "loss" in update.metrics]
    return sum(n * loss for n, loss in given) / sum(n for n, _ in given) if given else None


def _client_means(updates: Sequence[Update]) -> dict[str, float]:
    """The plain mean, over the clients that gave it, of every metric but the training loss: all clients count alike."""
    names = sorted({name for update in updates for name in update.metrics} - {"loss", "epsilon"})
    given = {name: [update.metrics[name] for update in updates if name in update.metrics] for name in names}
    if updates and updates[0].round > 0:
        given["seconds"] = [update.seconds for update in updates]  # of training, by the clients' own clocks
    return {f"clients_{name}": sum(values) / len(values) for name, values in given.items()}
