"""Every check that an arriving update passes before it may touch the global state. One bad client costs one update, not the round."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpeft import arrays, wire
from fedpeft.adapters.frozen import pretrained
from fedpeft.records import Arrays, Assignment, Failure, Layout, TensorSpec, Update, all_finite
from fedpeft.server.exchange import Reply

MAX_EXAMPLES = 10**9  # nobody has more; a larger weight would take over every mean


def judge(reply: Reply, base: str, specs: Mapping[str, TensorSpec]) -> Update | Failure:
    """The update in a reply, or the reason why it is not taken. It must be of this `base` and have tensors of these `specs`."""
    asked = reply.asked
    if reply.message is None:
        return Failure(asked.round, asked.client, "no answer in time")
    if reply.message.has_error():
        return Failure(asked.round, asked.client, f"client failed: {reply.message.error.reason}"[: wire.MAX_TEXT])
    try:
        answer, trained_on = wire.message_to_answer(reply.message)
    except wire.WireError as error:
        return Failure(asked.round, asked.client, f"malformed: {error}")
    if isinstance(answer, Failure):
        return Failure(asked.round, asked.client, answer.reason, _spent(answer.epsilon))
    reason = _identity(answer, trained_on, reply, base) or _content(answer, specs)
    return refused(answer, asked, reason) if reason else answer


def refused(update: Update, asked: Assignment, reason: str) -> Failure:
    """What is left of an update that is not taken: its cost in privacy stands."""
    return Failure(asked.round, asked.client, reason, _spent(update.metrics.get("epsilon")))


def _spent(epsilon: float | None) -> float | None:
    """An epsilon that a client has stated, if it is one."""
    return epsilon if epsilon is not None and math.isfinite(epsilon) and epsilon >= 0 else None


def _identity(update: Update, trained_on: str, reply: Reply, base: str) -> str | None:
    if update.round != reply.asked.round:
        return f"stale: answers round {update.round} in round {reply.asked.round}"
    if update.client != reply.asked.client:
        return f"wrong client: answers for {update.client}"
    if trained_on != base and pretrained(trained_on) == pretrained(base):
        return f"other frozen bases of the adapter: digest {trained_on}, here {base} (the same seed, base and libraries give the same)"
    if trained_on != base:
        return f"other base model: fingerprint {trained_on}, here {base}"
    return None


def _content(update: Update, specs: Mapping[str, TensorSpec]) -> str | None:
    got = Layout.specs(update.arrays)
    if got != dict(specs):
        name = min(name for name in got.keys() | specs.keys() if got.get(name) != specs.get(name))
        return f"wrong tensors: {name[:100]} is {_said(got.get(name))}, expected {_said(specs.get(name))}"
    if not 1 <= update.examples <= MAX_EXAMPLES:
        return f"absurd weight: {update.examples} examples"
    if not all(math.isfinite(value) for value in (*update.metrics.values(), update.seconds)):
        return "not finite: a metric (did the training diverge? lower training.learning_rate)"
    if not all_finite(update.arrays):
        return "not finite: a tensor (did the training diverge? lower training.learning_rate)"
    return None


def movement(update: Update, received: Arrays, max_norm: float, may_stay: bool = False) -> tuple[float, str | None]:
    """How far a trained update went from what was sent, and why that is not to be believed, if it is not.

    What was not sent counts from zero. What travels `may_stay` where more is trained than travels (A, while B is zero).
    """
    norm = arrays.movement(update.arrays, received)
    if norm == 0 and not may_stay:
        return norm, "did not move: the adapter came back as it was sent (learning rate 0, or nothing to train?)"
    return norm, arrays.beyond(norm, max_norm)


def _said(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
