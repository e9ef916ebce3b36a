"""The server's grid over its SuperLink: it waits for no upload, and takes no reply that is larger than an honest one."""

import numpy as np
import pytest
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse

from fedpeft import flower_private, wire
from fedpeft.flower_link import _grid_class
from fedpeft.records import Assignment, Update


class Runtime:
    """A Runtime API with one reply, of which `there` parts have arrived."""

    def __init__(self, reply):
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.announced = [(message_to_proto(remove_content_from_message(reply)), get_object_tree(reply))]
        self.parts = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        self.there = len(self.parts)
        self.known = True

    def PullMessages(self, request):
        announced, self.announced = self.announced, []
        return PullAppMessagesResponse(messages_list=[head for head, _ in announced], message_object_trees=[tree for _, tree in announced])

    def PullObject(self, request):
        place = sorted(self.parts).index(request.object_id)
        content = self.parts[request.object_id] if place < self.there else b""
        return PullObjectResponse(object_found=self.known, object_available=bool(content), object_content=content)

    def ConfirmMessageReceived(self, request):
        return None


@pytest.fixture
def made():
    flower_private.take_identity(1)
    asked = flower_private.stamp(wire.assignment_to_message(Assignment("train", 1, 0, {}), "base", 7))
    reply = wire.answer_to_message(Update(1, 0, {"x": np.ones(1000, np.float32)}, 5, {"loss": 1.0}), "base", asked)
    grid = _grid_class()("127.0.0.1:1", True, None, token="x")
    grid._client = Runtime(reply)
    grid.limit_bytes = 10_000
    return grid, grid._client, asked.metadata.message_id


def test_a_reply_is_there_when_all_of_it_is(made):
    grid, runtime, asked = made
    runtime.there = 2
    assert grid.pull_messages([asked]) == []
    runtime.there = len(runtime.parts)
    (message,) = grid.pull_messages([asked])
    update, _ = wire.message_to_answer(message)
    assert update.arrays["x"].sum() == 1000
    assert message.metadata.reply_to_message_id == asked
    assert grid.pull_messages([asked]) == []


def test_a_reply_that_is_too_large_is_an_error_of_that_client(made):
    grid, _, asked = made
    grid.limit_bytes = 3_000
    (message,) = grid.pull_messages([asked])
    assert message.metadata.reply_to_message_id == asked
    assert message.error.reason == "the reply is larger than the 3,000 bytes that are expected at most"
    assert message.error.code == 2, "it is not asked again"


def test_an_upload_that_was_broken_off_may_be_asked_for_again(made):
    grid, runtime, asked = made
    runtime.known = False
    (message,) = grid.pull_messages([asked])
    assert (message.error.code, message.error.reason) == (3, "the upload was broken off")


def test_parts_that_make_no_message_are_an_error_of_that_client(made):
    grid, runtime, asked = made
    runtime.parts = {name: b"junk" for name in runtime.parts}
    (message,) = grid.pull_messages([asked])
    assert message.error.reason.startswith("the reply cannot be put together")


def test_what_nobody_waits_for_any_more_is_dropped(made):
    grid, runtime, asked = made
    runtime.there = 1
    assert grid.pull_messages([asked]) == []
    runtime.there = len(runtime.parts)
    grid.forget([asked])
    assert grid.pull_messages([asked]) == []


def test_a_reply_is_kept_while_others_are_asked_for(made):
    """Flower announces it once, and both the round and the roster look for theirs."""
    grid, runtime, asked = made
    runtime.there = 1
    assert grid.pull_messages([asked]) == []
    assert grid.pull_messages(["another"]) == []
    runtime.there = len(runtime.parts)
    assert grid.pull_messages(["another"]) == []
    assert len(grid.pull_messages([asked])) == 1
