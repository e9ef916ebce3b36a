"""From the accepted updates of a round to what the strategy makes of them: one by one as they come, or all together.

A strategy that has a second question asks it of those whose updates were accepted; who does not answer it is not in the round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from fedpeft import wire
from fedpeft.records import Arrays, Assignment, Update
from fedpeft.server.asking import Judged, judge
from fedpeft.server.exchange import Exchange
from fedpeft.server.federation import Federation
from fedpeft.strategies.strategy import Combined, Round


@dataclass(frozen=True)
class Turnout:
    """A round whose clients have been asked."""

    federation: Federation
    received: Arrays  # what the clients start from
    at: Round
    traffic: Exchange
    judged: Judged
    ask: Callable[[Sequence[Assignment]], Exchange]  # something more, in the same round


def combine_as_they_come(turnout: Turnout, arriving: Iterator[Update]) -> Combined | None:
    """What the strategy makes of the updates, none of which is kept; None when there are none."""
    first = next(arriving, None)
    if first is None:
        return None
    updates = itertools.chain([first], arriving)
    del first
    streamed = cast(Sequence[Update], updates)  # the strategy reads them once
    return turnout.federation.strategy.combine(streamed, turnout.received, turnout.at)


def combine_together(turnout: Turnout, updates: list[Update]) -> tuple[Combined | None, Judged]:
    """What the strategy makes of the updates, and who is in it: of those who were asked twice, who answered twice."""
    strategy, fewest = turnout.federation.strategy, turnout.federation.fewest
    judged = turnout.judged
    question = strategy.second(updates, turnout.at) if len(updates) >= fewest else {}
    if question:
        updates, judged = _ask_again(turnout, question, updates)
    if len(updates) < fewest:
        return None, judged
    return strategy.combine(updates, {**turnout.received, **question}, turnout.at), judged


def _ask_again(turnout: Turnout, question: Arrays, updates: list[Update]) -> tuple[list[Update], Judged]:
    """The second question of a round, to those whose first answer was accepted; both answers become one update."""
    federation, round, before = turnout.federation, turnout.at.number, turnout.judged
    first = {update.client: update for update in updates}
    asked, judged = [Assignment(wire.SECOND, round, client, question) for client in first], Judged()
    traffic = turnout.ask(asked)
    answers = judge(traffic, federation, lambda client: federation.strategy.answers(federation.at(round, client)), judged)
    both = [replace(first[answer.client], arrays={**first[answer.client].arrays, **answer.arrays}) for answer in answers]
    turnout.traffic.after(traffic)
    accepted = [update for update in before.accepted if update.client in {answer.client for answer in judged.accepted}]
    return both, Judged(accepted, before.failed + judged.failed, before.norms, before.seconds + judged.seconds)
