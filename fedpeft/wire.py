"""Records to Flower messages and back. Simulated and real messages are the same bytes.

A message holds ONE flat byte array and a manifest (JSON): a tensor each would cost Flower two requests a tensor.

    arrays    uint8 [bytes]      the tensors' bytes end to end, in the order of the manifest
    manifest  {"schema", "kind", "round", "client", "base", "tensors": [[name, dtype, shape], ...], "sha256", ...}

Nothing is unpickled. What cannot be read as such a message is a `WireError` that says why; server/validation.py judges the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedpeft.records import Arrays, Assignment, Failure, Update

SCHEMA = 1
STYPE = "fedpeft.flat"
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "float16", "int64", "uint8")}
MAX_BYTES = 2**31  # of the tensors of one message
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_TEXT = 500
TRAIN, QUERY = "train", "query"  # Flower's message types: training, and everything asked before it
SECOND = "second"  # the action of a second question in a round of training
JOIN, END = "join", "end"  # the first and the last question to a real client: will you take part in this task; it is over
POLL_SECONDS = 0.2  # how often either side looks for messages; Flower's own server and clients look every 3 s


class WireError(ValueError):
    """A message that cannot be taken for what it claims to be."""


def assignment_to_message(assignment: Assignment, base: str, node: int) -> Message:
    """What the server sends to Flower node `node`; `base` is the fingerprint of the base the arrays belong to."""
    header = {"kind": "assignment", "action": assignment.action, "round": assignment.round, "client": assignment.client}
    header |= {"base": base, "held": assignment.held}
    return Message(_content(header, assignment.arrays), dst_node_id=node, message_type=TRAIN if assignment.round else QUERY)


def message_to_assignment(message: Message) -> tuple[Assignment, str]:
    """The assignment in a message, and the fingerprint of the base it was made for."""
    header, arrays = _read(message, "assignment")
    assignment = Assignment(_text(header, "action"), _whole(header, "round"), _whole(header, "client"), arrays, _text(header, "held"))
    return assignment, _text(header, "base")


def answer_to_message(answer: Update | Failure, base: str, asked: Message) -> Message:
    """What a client sends back for the message `asked`."""
    header: dict[str, Any] = {"round": answer.round, "client": answer.client, "base": base}
    if isinstance(answer, Failure):
        said = {} if answer.epsilon is None else {"epsilon": answer.epsilon}
        return Message(_content({**header, **said, "kind": "failure", "reason": answer.reason[:MAX_TEXT]}, {}), reply_to=asked)
    header |= {"kind": "update", "examples": answer.examples, "metrics": answer.metrics, "seconds": answer.seconds}
    return Message(_content(header, answer.arrays), reply_to=asked)


def message_to_answer(message: Message) -> tuple[Update | Failure, str]:
    """The update or failure in a reply, and the fingerprint of the base it was trained on."""
    header, arrays = _read(message, "update", "failure")
    round, client, base = _whole(header, "round"), _whole(header, "client"), _text(header, "base")
    if header["kind"] == "failure":
        return Failure(round, client, _text(header, "reason"), _number(header, "epsilon") if "epsilon" in header else None), base
    metrics = header.get("metrics")
    if not isinstance(metrics, dict) or not all(_is_text(key) and _is_number(value) for key, value in metrics.items()):
        raise WireError("metrics are not numbers by name")
    update = Update(
        round, client, arrays, _whole(header, "examples"), {k: float(v) for k, v in metrics.items()}, _number(header, "seconds")
    )
    return update, base


def _content(header: Mapping[str, Any], arrays: Arrays) -> RecordDict:
    parts, tensors = [], []
    for name in sorted(arrays):
        array = arrays[name]
        if array.dtype.name not in DTYPES:
            raise WireError(f"{name} has dtype {array.dtype}, which does not travel; allowed: {', '.join(DTYPES)}")
        parts.append(np.ascontiguousarray(array, DTYPES[array.dtype.name]).tobytes())
        tensors.append([name, array.dtype.name, list(array.shape)])
    flat = b"".join(parts)
    manifest = {"schema": SCHEMA, **header, "tensors": tensors, "sha256": hashlib.sha256(flat).hexdigest()}
    return RecordDict(
        {
            "arrays": ArrayRecord({"flat": Array(dtype="uint8", shape=(len(flat),), stype=STYPE, data=flat)}),
            "manifest": ConfigRecord({"json": json.dumps(manifest)}),
        }
    )


def _read(message: Message, *kinds: str) -> tuple[dict[str, Any], Arrays]:
    """The manifest and the arrays of a message, or a WireError."""
    try:
        flat = message.content["arrays"]["flat"]
        header = json.loads(str(message.content["manifest"]["json"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WireError(f"no manifest and arrays in the message ({type(error).__name__})") from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA or header.get("kind") not in kinds:
        raise WireError(f"not a message of schema {SCHEMA} and kind {' or '.join(kinds)}")
    if not isinstance(flat, Array) or flat.stype != STYPE or len(flat.data) > MAX_BYTES:
        raise WireError("the arrays are not flat bytes of an allowed size")
    if hashlib.sha256(flat.data).hexdigest() != header.get("sha256"):
        raise WireError("the arrays do not have the hash of the manifest")
    return header, _unpack(flat.data, header.get("tensors"))


def _unpack(flat: bytes, tensors: Any) -> Arrays:
    if not isinstance(tensors, list) or len(tensors) > MAX_TENSORS:
        raise WireError("the manifest lists no tensors")
    arrays: Arrays = {}
    start = 0
    for entry in tensors:
        try:
            name, dtype, shape = entry
            kind = DTYPES[dtype]
            wrong = not isinstance(name, str) or name in arrays or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS
            wrong = wrong or any(type(size) is not int or not 0 <= size < MAX_BYTES for size in shape)
            wrong = wrong or math.prod(max(1, size) for size in shape) * kind.itemsize > MAX_BYTES  # NumPy has no such shape, though empty
        except (TypeError, ValueError, KeyError) as error:
            raise WireError("a tensor of the manifest is not [name, dtype, shape]") from error
        if wrong:
            raise WireError("a tensor of the manifest stands twice or has no proper name and shape")
        size = math.prod(shape) * kind.itemsize
        if start + size > len(flat):
            raise WireError(f"the arrays end inside {name!r}")
        arrays[name] = np.frombuffer(flat, kind, math.prod(shape), start).reshape(shape).astype(kind.newbyteorder("="), copy=False)
        start += size
    if start != len(flat):
        raise WireError("the arrays go on after the last tensor of the manifest")
    return arrays


def _text(header: Mapping[str, Any], key: str) -> str:
    value = header.get(key)
    if not _is_text(value):
        raise WireError(f"{key} is no text of at most {MAX_TEXT} characters")
    return str(value)


def _is_text(value: Any) -> bool:
    """Text that can be written to a file: no lone surrogates, which JSON can carry."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _whole(header: Mapping[str, Any], key: str) -> int:
    value = header.get(key)
    if type(value) is not int or not 0 <= value < 2**62:
        raise WireError(f"{key} is no whole number")
    return value


def _number(header: Mapping[str, Any], key: str) -> float:
    value = header.get(key)
    if not _is_number(value):
        raise WireError(f"{key} is no number")
    return float(value)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    """A number that fits a float: JSON carries whole numbers of any size."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
