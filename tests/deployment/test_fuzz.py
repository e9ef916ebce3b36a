"""Thousands of malformed updates: not one is accepted, not one is more than a reason in the record."""

import copy
import hashlib
import json
import math
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft import flower_private, wire
from fedpeft.records import Assignment, Failure, Layout, Update
from fedpeft.server import validation
from fedpeft.server.exchange import Reply

BASE = "00ff00ff00ff00ff"
RECEIVED = {
    "a.lora_A.weight": np.zeros((2, 3), np.float32),
    "a.lora_B.weight": np.zeros((3, 2), np.float32),
    "head.bias": np.zeros(3, np.float32),
}
SPECS = Layout.specs(RECEIVED)
MAX_NORM = 100.0

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def good():
    """The header and the bytes of an update that is accepted."""
    arrays = {name: np.full_like(array, 0.5) for name, array in RECEIVED.items()}
    update = Update(3, 1, arrays, 17, {"loss": 0.25}, 1.5)
    message = wire.answer_to_message(update, BASE, asked())
    return json.loads(message.content["manifest"]["json"]), message.content["arrays"]["flat"].data


def asked():
    flower_private.take_identity(1)
    return flower_private.stamp(wire.assignment_to_message(Assignment("train", 3, 1, RECEIVED), BASE, 7))


def judged(header, flat, sealed=True):
    """What the server makes of it: an Update only when every check has passed."""
    if sealed and isinstance(header, dict) and isinstance(flat, bytes):
        header = {**header, "sha256": hashlib.sha256(flat).hexdigest()}
    text = header if isinstance(header, str) else json.dumps(header)
    record = RecordDict(
        {
            "arrays": ArrayRecord({"flat": Array(dtype="uint8", shape=(len(flat),), stype=wire.STYPE, data=flat)}),
            "manifest": ConfigRecord({"json": text}),
        }
    )
    message = flower_private.from_bytes(flower_private.to_bytes(flower_private.stamp(Message(record, reply_to=asked()))))
    reply = Reply(Assignment("train", 3, 1, RECEIVED), message)
    answer = validation.judge(reply, BASE, SPECS)
    if isinstance(answer, Update):
        _, reason = validation.movement(answer, RECEIVED, MAX_NORM)
        return Failure(3, 1, reason) if reason else answer
    return answer


def field(name, values, is_good=lambda value: False):
    @st.composite
    def change(draw):
        header, flat = good()
        value = draw(values.filter(lambda value: not is_good(value)))
        return {**header, name: value}, flat

    return change()


def whole(good_value):
    return lambda value: type(value) is int and value == good_value


@st.composite
def without_field(draw):
    header, flat = good()
    header.pop(draw(st.sampled_from(sorted(header.keys() - {"sha256"}))))
    return header, flat


@st.composite
def other_tensors(draw):
    """The manifest's list of tensors: entries lost, doubled, renamed, reshaped, retyped, or junk."""
    header, flat = good()
    tensors = copy.deepcopy(header["tensors"])
    row = draw(st.integers(0, len(tensors) - 1))
    how = draw(st.sampled_from(["lose", "double", "rename", "shape", "dtype", "entry", "list", "extra", "transpose"]))
    if how == "lose":
        size = math.prod(tensors[row][2]) * 4
        start = sum(math.prod(entry[2]) * 4 for entry in tensors[:row])
        flat = flat[:start] + flat[start + size :]
        del tensors[row]
    elif how == "double":
        tensors.insert(row, tensors[row])
        flat += flat[:24] if draw(st.booleans()) else b""
    elif how == "rename":
        old = tensors[row][0]
        tensors[row][0] = draw(junk.filter(lambda value: value != old))
    elif how == "shape":
        old = tensors[row][2]
        huge = st.lists(st.integers(-(2**65), 2**65), max_size=12)
        tensors[row][2] = draw((huge | junk).filter(lambda value: value != old))
    elif how == "dtype":
        tensors[row][1] = draw(
            (st.sampled_from(["float64", "float16", "int64", "uint8", "object", "bfloat16", "complex64"]) | junk).filter(
                lambda value: value != "float32"
            )
        )
    elif how == "entry":
        tensors[row] = draw(junk.filter(lambda value: value != tensors[row]))
    elif how == "extra":
        tensors.append([draw(st.text(max_size=9)), "uint8", [draw(st.integers(0, 9))]])
        flat += bytes(tensors[-1][2][0])
    elif how == "transpose":
        tensors[row][2] = [*reversed(tensors[row][2]), 1]
    else:
        tensors = draw(junk.filter(lambda value: value != header["tensors"]))
    return {**header, "tensors": tensors}, flat


@st.composite
def other_values(draw):
    """The right tensors with values that no training gives."""
    header, flat = good()
    values = np.frombuffer(flat, np.float32).copy()
    bad = st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -3e38, 1e9])
    for place in draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4)):
        values[place] = draw(bad)
    return header, values.tobytes()


@st.composite
def other_bytes(draw):
    """Too few bytes, or too many."""
    header, flat = good()
    cut = draw(st.integers(-len(flat), 64).filter(bool))
    return header, flat + draw(st.binary(min_size=cut, max_size=cut)) if cut > 0 else flat[:cut]


@st.composite
def text_for_manifest(draw):
    _, flat = good()
    deep = st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth)
    return draw(st.text(max_size=60) | deep | junk.map(json.dumps)), flat


numbers = junk | st.integers() | st.floats() | st.sampled_from([0, -1, 10**10, 2**63, 2**200, True, "17", 17.5, float("nan")])
MALFORMED = st.one_of(
    without_field(),
    other_tensors(),
    other_values(),
    other_bytes(),
    text_for_manifest(),
    field("round", numbers, whole(3)),
    field("client", numbers, whole(1)),
    field("base", junk | st.just("feedbeef"), lambda value: value == BASE),
    field("schema", junk, lambda value: value == wire.SCHEMA),
    field("kind", junk | st.sampled_from(["assignment", "failure", "Update"]), lambda value: value == "update"),
    field("examples", numbers, lambda value: type(value) is int and 1 <= value <= validation.MAX_EXAMPLES),
    field(
        "metrics", st.dictionaries(st.text(max_size=4), st.sampled_from([float("nan"), float("inf"), "x", None, [1], 2**80]), min_size=1)
    ),
    field("seconds", st.sampled_from([float("nan"), float("inf"), "1", None, [], 2**80])),
)


def check(change):
    header, flat = change
    answer = judged(header, flat)
    assert isinstance(answer, Failure), (header, flat)
    assert 0 < len(answer.reason) <= 2000
    json.dumps(answer.reason).encode()  # it goes into rounds.jsonl


def test_the_update_that_is_spoilt_is_a_good_one():
    assert isinstance(judged(*good()), Update)


def test_bytes_that_do_not_have_their_hash_are_not_taken():
    header, flat = good()
    assert "hash" in judged(header, flat[:-1] + b"\x01", sealed=False).reason


quick = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
long = settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(MALFORMED)
def test_no_malformed_update_is_accepted(change):
    check(change)


@pytest.mark.slow
@long
@given(MALFORMED)
def test_none_of_ten_thousand_malformed_updates_is_accepted(change):
    check(change)


def test_a_manifest_that_claims_terabytes_costs_no_memory():
    header, flat = good()
    tracemalloc.start()
    answer = judged({**header, "tensors": [[f"t{row}", "float32", [2**30, 2**10]] for row in range(9)]}, flat)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(answer, Failure)
    assert peak < 2**22
