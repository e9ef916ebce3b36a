"""THE round loop, over any Flower `Grid`: simulated clients in this process, or real ones behind a SuperLink.

A round: sample -> send -> receive -> validate -> combine -> apply -> evaluate -> record -> checkpoint.
Before round 1 the clients may be surveyed (`training.head_init`), and the model is evaluated as it stands: that is round 0.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from flwr.serverapp import Grid

from fedpeft import arrays as arithmetic
from fedpeft import wire
from fedpeft.errors import Problem, RunStopped, UserError
from fedpeft.privacy.guard import SPENT
from fedpeft.records import Arrays, Assignment, Metrics, RoundRecord, Update
from fedpeft.screen import Screen
from fedpeft.server import checkpoint, sampling
from fedpeft.server.asking import Judged, assign, judge
from fedpeft.server.exchange import Exchange, exchange
from fedpeft.server.federation import Federation, Outcome
from fedpeft.server.private_round import private_round
from fedpeft.server.run_folder import RunFolder
from fedpeft.strategies.strategy import Round

MAX_EMPTY_ROUNDS = 3  # rounds in a row without enough accepted updates, after which a run stops


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
    return Outcome(kept.arrays, kept.strategy, records)


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
    whole = checkpoint.Checkpoint(record.round, outcome.arrays, outcome.state, federation.memories(), federation.base, federation.data)
    try:
        folder.append(record)
        checkpoint.write(folder.checkpoint, whole)
    except OSError as error:
        do = "make room, and go on after the round before with --resume"
        raise RunStopped(f"round {record.round} cannot be written to {folder.path} ({error.strerror}); {do}") from error
    for client, reason in record.rejected_clients.items():
        screen.note(f"round {record.round}: client {client} left out: {reason}")
    screen.round_done(record, federation.config.strategy.num_rounds)


def _before_training(federation: Federation, grid: Grid, outcome: Outcome) -> RoundRecord:
    """Round 0: the surveys, if there are any, and the metrics before any training."""
    started = time.perf_counter()
    traffic, judged = Exchange([], 0, 0), Judged()
    for survey in federation.surveys:
        roster = _wait_for(federation)
        asked = assign(federation, survey.action, sorted(roster), outcome, 0)
        answered = exchange(grid, asked.assignments, roster, federation.base, federation.config.strategy.round_timeout, federation.roster)
        judged = judge(answered, federation, lambda client, survey=survey: survey.expects)  # type: ignore[misc]
        if not judged.accepted:
            reasons = "; ".join(sorted({failure.reason for failure in judged.failed}))
            raise RunStopped(f"no client answered the survey {survey.action} before round 1: {reasons}")
        outcome.arrays = {**outcome.arrays, **survey.finish(arithmetic.total(update.arrays for update in judged.accepted))}
        traffic = answered.after(traffic)
    surveyed = time.perf_counter()
    metrics = federation.evaluate(outcome.arrays)
    seconds = {"exchange": surveyed - started, "evaluate": time.perf_counter() - surveyed}
    return _record(0, traffic, judged, metrics, 0.0, seconds, {})


def _play(federation: Federation, grid: Grid, outcome: Outcome, round: int) -> RoundRecord:
    """One round; moves the outcome's arrays and state unless too few updates were accepted."""
    settings = federation.config.strategy
    times = [time.perf_counter()]
    roster = _wait_for(federation)
    private = private_round(federation, round)
    if private is not None:
        clients = private.sample(roster)
    else:
        able = [client for client in roster if client not in outcome.spent]
        clients = sampling.choose(able, settings.fraction_train, settings.min_train_nodes, federation.config.seed, round)
    received, at = outcome.arrays, federation.at(round)
    asked = assign(federation, wire.TRAIN, clients, outcome, round)
    traffic = exchange(grid, asked.assignments, roster, federation.base, settings.round_timeout, federation.roster)
    trained = federation.trains(received)
    judged = judge(traffic, federation, lambda client: federation.strategy.uploads(trained, federation.at(round, client)), received)
    outcome.spent |= {failure.client for failure in judged.failed if failure.reason.startswith(SPENT)}
    outcome.seen |= {update.client: round - 1 for update in judged.accepted}
    for failure in judged.failed:  # it may have lost what it was sent: the next time it is sent everything
        outcome.seen.pop(failure.client, None)
    question = federation.strategy.second(judged.accepted, at) if len(judged.accepted) >= federation.fewest else {}
    if question:
        traffic, judged = _ask_again(federation, grid, roster, question, traffic, judged, at)
    times.append(time.perf_counter())
    moved, said = 0.0, {}
    if len(judged.accepted) >= federation.fewest:
        updates = judged.accepted if private is None else private.release(judged.accepted, received, federation, outcome.state)
        combined = federation.strategy.combine(updates, {**received, **question}, at)
        applied, state = federation.strategy.apply(received, combined.arrays, outcome.state)
        outcome.state = state if private is None else state | private.state
        outcome.arrays = federation.settle(applied)
        said = combined.report
        moved = arithmetic.norm(arithmetic.difference({name: outcome.arrays[name] for name in received}, received))
    times.append(time.perf_counter())
    metrics = federation.evaluate(outcome.arrays) if moved else outcome.records[-1].metrics
    times.append(time.perf_counter())
    if federation.ranks:
        said = {**said, "left_out_by_rank": sum(asked.left_out.values()) / len(asked.left_out)}
    spent = [end - start for start, end in itertools.pairwise(times)]
    seconds = dict(zip(("exchange", "combine", "evaluate"), spent, strict=True))
    record = _record(round, traffic, judged, metrics, moved, seconds, said)
    return record if private is None else private.censored(record)


def _ask_again(
    federation: Federation, grid: Grid, roster: dict[int, int], question: Arrays, traffic: Exchange, judged: Judged, at: Round
) -> tuple[Exchange, Judged]:
    """The second question of a round, to those whose first answer was accepted; both answers become one update."""
    first = {update.client: update for update in judged.accepted}
    asked = [Assignment(wire.SECOND, at.number, client, question) for client in first]
    answered = exchange(grid, asked, roster, federation.base, federation.config.strategy.round_timeout, federation.roster)
    again = judge(answered, federation, lambda client: federation.strategy.answers(federation.at(at.number, client)))
    both = [replace(first[update.client], arrays={**first[update.client].arrays, **update.arrays}) for update in again.accepted]
    return traffic.after(answered), Judged(both, judged.failed + again.failed, judged.norms)


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
    """The last rounds, or all of a shorter run, had too few accepted updates to move anything."""
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
        asked=len(traffic.replies),
        accepted=len(judged.accepted),
        rejected=dict(sorted(Counter(failure.reason.split(":")[0] for failure in judged.failed).items())),
        rejected_clients={str(failure.client): failure.reason for failure in judged.failed},
        loss=_training_loss(judged.accepted),
        metrics=metrics,
        examples=examples,
        bytes_up=traffic.bytes_up,
        bytes_down=traffic.bytes_down,
        update_norm=moved,
        client_update_norms=judged.norms,
        seconds=seconds,
        epsilon=max((update.metrics["epsilon"] for update in judged.accepted if "epsilon" in update.metrics), default=None),
        report={**said, **_client_means(judged.accepted)},
    )


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
