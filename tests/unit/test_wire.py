"""The wire: what is sent arrives bit for bit; what is malformed is refused by name and reaches nobody."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft import flower_private, wire
from fedpeft.arrays import digest
from fedpeft.records import Assignment, Failure, Update

flower_private.take_identity(1)

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
tensors = st.dictionaries(
    st.text(min_size=1, max_size=20),
    st.sampled_from(sorted(wire.DTYPES)).flatmap(lambda dtype: hnp.arrays(np.dtype(dtype), shapes)),
    max_size=5,
)


def over_the_wire(message):
    return flower_private.from_bytes(flower_private.to_bytes(message))


@given(arrays=tensors, round=st.integers(0, 10**9), client=st.integers(0, 10**9))
def test_an_assignment_arrives_bit_for_bit(arrays, round, client):
    sent = Assignment("train", round, client, arrays)
    got, base = wire.message_to_assignment(over_the_wire(wire.assignment_to_message(sent, "abc", 7)))
    assert (got.action, got.round, got.client, base) == ("train", round, client, "abc")
    assert digest(got.arrays) == digest(arrays)


@given(arrays=tensors, examples=st.integers(0, 10**12), loss=st.floats(allow_nan=False))
def test_an_update_arrives_bit_for_bit(arrays, examples, loss):
    asked = flower_private.stamp(wire.assignment_to_message(Assignment("train", 3, 2, {}), "abc", 7))
    sent = Update(3, 2, arrays, examples, {"loss": loss}, 1.5)
    got, base = wire.message_to_answer(over_the_wire(wire.answer_to_message(sent, "abc", asked)))
    assert isinstance(got, Update)
    assert (got.round, got.client, got.examples, got.metrics, got.seconds, base) == (3, 2, examples, {"loss": loss}, 1.5, "abc")
    assert digest(got.arrays) == digest(arrays)


def test_a_failure_arrives_with_its_reason():
    asked = flower_private.stamp(wire.assignment_to_message(Assignment("train", 3, 2, {}), "abc", 7))
    got, _ = wire.message_to_answer(over_the_wire(wire.answer_to_message(Failure(3, 2, "out of memory"), "abc", asked)))
    assert got == Failure(3, 2, "out of memory")


def test_a_dtype_that_numpy_cannot_carry_is_refused_by_name():
    with pytest.raises(wire.WireError, match="w has dtype complex128"):
        wire.assignment_to_message(Assignment("train", 1, 0, {"w": np.zeros(2, complex)}), "abc", 7)


def update_message(change=lambda manifest: None, flat=None):
    """A proper update message with its manifest changed."""
    asked = flower_private.stamp(wire.assignment_to_message(Assignment("train", 3, 2, {}), "abc", 7))
    message = wire.answer_to_message(Update(3, 2, {"w": np.ones((2, 3), np.float32)}, 5, {"loss": 1.0}), "abc", asked)
    manifest = json.loads(message.content["manifest"]["json"])
    change(manifest)
    message.content["manifest"]["json"] = json.dumps(manifest)
    if flat is not None:
        message.content["arrays"] = ArrayRecord({"flat": Array(dtype="uint8", shape=(len(flat),), stype=wire.STYPE, data=flat)})
    return message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(schema=2), "schema"),
        (lambda m: m.update(kind="assignment"), "kind"),
        (lambda m: m.update(sha256="0" * 64), "hash"),
        (lambda m: m.update(tensors=None), "lists no tensors"),
        (lambda m: m.update(tensors=[["w", "float32", [2, 4]]]), "end inside"),
        (lambda m: m.update(tensors=[["w", "float32", [2, 2]]]), "go on after"),
        (lambda m: m.update(tensors=[["w", "float32", [2]], ["w", "float32", [4]]]), "twice"),
        (lambda m: m.update(tensors=[["w", "float32", [-2, -3]]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "object", [2, 3]]]), "name, dtype, shape"),
        (lambda m: m.update(tensors=[["w", "float32", [True, 6]]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "float32", [2**30, 2**30]]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "float32", [2**40, 2**40]]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "float32", [0, 2**70]]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "float32", [0, 2**31 - 1, 2**31 - 1, 2**31 - 1]]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "float32", {}]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "float32", ""]]), "proper name and shape"),
        (lambda m: m.update(tensors=[["w", "float32", [1] * 65]]), "proper name and shape"),
        (lambda m: m.update(metrics={"loss": 10**400}), "metrics"),
        (lambda m: m.update(metrics={"\ud800": 1.0}), "metrics"),
        (lambda m: m.update(seconds=10**400), "seconds"),
        (lambda m: m.update(base="x" * 10_000), "base"),
        (lambda m: m.update(tensors=["w"]), "name, dtype, shape"),
        (lambda m: m.update(tensors=[["w", ["float32"], [2, 3]]]), "name, dtype, shape"),
        (lambda m: m.update(examples=-1), "examples"),
        (lambda m: m.update(examples=2.5), "examples"),
        (lambda m: m.update(examples=True), "examples"),
        (lambda m: m.pop("round"), "round"),
        (lambda m: m.update(metrics={"loss": "low"}), "metrics"),
        (lambda m: m.update(metrics=[1]), "metrics"),
        (lambda m: m.update(seconds=None), "seconds"),
        (lambda m: m.update(base=7), "base"),
    ],
)
def test_a_malformed_update_is_refused_with_its_reason(change, says):
    with pytest.raises(wire.WireError, match=says):
        wire.message_to_answer(update_message(change))


def test_bytes_changed_on_the_way_are_noticed():
    with pytest.raises(wire.WireError, match="hash"):
        wire.message_to_answer(update_message(flat=b"\0" * 24))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"manifest": ConfigRecord({"json": "{"}), "arrays": ArrayRecord()}),
        RecordDict({"manifest": ConfigRecord({"json": "[" * 100_000}), "arrays": ArrayRecord({"flat": Array(np.zeros(1))})}),
        RecordDict({"manifest": ConfigRecord({"json": 3}), "arrays": ArrayRecord({"flat": Array(np.zeros(1))})}),
        RecordDict({"manifest": ArrayRecord(), "arrays": ConfigRecord()}),
    ],
)
def test_a_message_of_another_kind_is_refused(content):
    with pytest.raises(wire.WireError):
        wire.message_to_answer(Message(content, dst_node_id=7, message_type="train"))


def test_arrays_that_numpy_would_unpickle_are_refused():
    message = update_message()
    message.content["arrays"] = ArrayRecord({"flat": Array(np.array([1, 2, 3]))})
    with pytest.raises(wire.WireError, match="flat bytes"):
        wire.message_to_answer(message)


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from(["schema", "kind", "round", "client", "base", "tensors", "sha256", "examples", "metrics", "seconds", "reason"])


@given(changes=st.dictionaries(fields, junk, min_size=1, max_size=4))
def test_junk_in_a_manifest_is_an_answer_or_a_wire_error_and_nothing_else(changes):
    try:
        answer, _ = wire.message_to_answer(update_message(lambda manifest: manifest.update(changes)))
    except wire.WireError:
        return
    assert isinstance(answer, Update | Failure)
    json.dumps([answer.round, answer.client, getattr(answer, "metrics", {})]).encode()
