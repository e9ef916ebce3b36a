"""Who is there, and what becomes of messages when somebody is not any more: a SuperLink that is played by the test."""

import io
import json

import numpy as np
import pytest
from flwr.app import Error, Message

from fedpeft import flower_private, keys, wire
from fedpeft.flower_link import NodeFacts, public_key_bytes
from fedpeft.records import Assignment, Failure, Update
from fedpeft.screen import Plain
from fedpeft.server import exchange as exchanging
from fedpeft.server.exchange import Exchange
from fedpeft.server.roster import Roster

GONE = 5


class Link:
    """A SuperLink whose nodes come and go as the test says; replies are made by `answer(assignment)`."""

    def __init__(self, answer):
        flower_private.take_identity(1)
        self.answer = answer
        self.facts = {}
        self.asked = []
        self.replies = []

    def nodes(self):
        return list(self.facts.values())

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if not any(facts.node == node and facts.online for facts in self.facts.values()):
                ids.append(None)
                continue
            flower_private.stamp(message)
            assignment, _ = wire.message_to_assignment(message)
            self.asked.append((assignment.action, assignment.client, node))
            ids.append(message.metadata.message_id)
            self.replies += self.answer(assignment, message)
        return ids

    def pull_messages(self, ids):
        found, self.replies = self.replies, []
        return found


def update(assignment, message, value=1.0):
    answer = Update(assignment.round, assignment.client, {"x": np.full(1, value, np.float32)}, 12, {"loss": 1.0})
    return flower_private.stamp(wire.answer_to_message(answer, "", message))


def gone(message):
    return flower_private.stamp(Message(Error(GONE, "node_unavail"), reply_to=message))


@pytest.fixture
def listed(tmp_path):
    keys.make(tmp_path, ["localhost"], ["anna", "ben"])
    return keys.listed(tmp_path)


def facts(one, node, online=True, activated="monday"):
    return NodeFacts(node, public_key_bytes(one.key), online, activated)


def made(link, listed):
    screen = io.StringIO()
    return Roster(link, link, listed, {"task": np.frombuffer(b"{}", np.uint8)}, Plain(screen)), screen


def test_a_client_keeps_its_number_wherever_it_comes_from(listed):
    link = Link(lambda assignment, message: [update(assignment, message)])
    roster, screen = made(link, listed)
    anna, ben = listed
    link.facts["ben"] = facts(ben, 70)
    assert [roster(), roster()] == [{}, {1: 70}]
    link.facts["anna"] = facts(anna, 90)
    assert [roster(), roster()] == [{1: 70}, {0: 90, 1: 70}]
    link.facts["ben"] = facts(ben, 71, activated="tuesday")
    assert [roster(), roster()] == [{0: 90}, {0: 90, 1: 71}], "it is away for one call"
    assert [(action, client) for action, client, _ in link.asked] == [("join", 1), ("join", 0), ("join", 1)]
    assert "ben (client 1) takes part with 12 examples" in screen.getvalue()


def test_who_is_not_online_or_not_listed_or_revoked_is_not_asked(listed, tmp_path):
    link = Link(lambda assignment, message: [update(assignment, message)])
    file = tmp_path / "clients.yaml"
    file.write_text(file.read_text().replace("  client: 1\n", "  client: 1\n  revoked: true\n"))
    anna, ben = keys.listed(tmp_path)
    roster, screen = made(link, [anna, ben])
    link.facts = {"anna": facts(anna, 90, online=False), "ben": facts(ben, 70), "stranger": NodeFacts(5, b"key", True, "monday")}
    assert roster() == {}
    assert link.asked == []
    link.facts["anna"] = facts(anna, 90)
    assert [roster(), roster()] == [{}, {0: 90}]
    link.facts["anna"] = facts(anna, 90, online=False)
    assert roster() == {}
    assert "anna (client 0) has gone" in screen.getvalue()


def test_who_refuses_is_not_asked_again_before_it_comes_back(listed):
    def refuse(assignment, message):
        return [flower_private.stamp(wire.answer_to_message(Failure(0, assignment.client, "limits: no"), "", message))]

    link = Link(refuse)
    roster, screen = made(link, listed)
    link.facts["anna"] = facts(listed[0], 90)
    assert roster() == {} == roster()
    assert len(link.asked) == 1
    assert screen.getvalue().splitlines() == ["anna (client 0) does not take part: limits: no"]
    link.facts["anna"] = facts(listed[0], 90, activated="tuesday")
    roster()
    assert len(link.asked) == 2


def test_who_went_while_it_was_asked_to_join_is_asked_again(listed):
    answers = [lambda assignment, message: [gone(message)], lambda assignment, message: [update(assignment, message)]]
    link = Link(lambda assignment, message: answers.pop(0)(assignment, message))
    roster, _ = made(link, listed)
    link.facts["anna"] = facts(listed[0], 90)
    assert [roster(), roster(), roster()] == [{}, {}, {0: 90}]


ASKED = [Assignment("train", 1, client, {"x": np.zeros(1, np.float32)}) for client in (0, 1)]
NODES = {0: 90, 1: 70}


def there(link, listed):
    link.facts = {one.name: facts(one, NODES[one.client]) for one in listed}
    return link


def test_a_second_answer_and_a_stray_one_are_not_counted(listed):
    stray = flower_private.stamp(wire.assignment_to_message(ASKED[0], "", 90)) if flower_private.take_identity(1) is None else None

    def twice(assignment, message):
        return [update(assignment, message, 1.0), update(assignment, message, 2.0), update(assignment, stray, 3.0)]

    traffic = Exchange(there(Link(twice), listed), ASKED, NODES, "", 5.0)
    values = [wire.message_to_answer(reply.message)[0].arrays["x"][0] for reply in traffic.replies]
    assert values == [1.0, 1.0]


def test_who_goes_and_comes_back_is_asked_again(listed):
    seen = []

    def answer(assignment, message):
        seen.append(assignment.client)
        return [gone(message)] if seen.count(1) == 1 and assignment.client == 1 else [update(assignment, message)]

    times = iter([{0: 90}, {0: 90}, {0: 90, 1: 70}])
    traffic = Exchange(there(Link(answer), listed), ASKED, NODES, "", 5.0, lambda: next(times))
    assert not any(reply.message.has_error() for reply in traffic.replies)
    assert seen == [0, 1, 1]


def test_whose_message_was_lost_while_nobody_looked_is_asked_again(listed):
    """It was killed with the message, and was back before the SuperLink could miss it: the roster has seen it come anew."""
    seen = []

    def answer(assignment, message):
        seen.append(assignment.client)
        return [] if seen.count(1) == 1 and assignment.client == 1 else [update(assignment, message)]

    times = iter([{0: 90, 1: 70}, {0: 90}, {0: 90, 1: 70}])
    traffic = Exchange(there(Link(answer), listed), ASKED, NODES, "", 5.0, lambda: next(times))
    assert not any(reply.message is None for reply in traffic.replies)
    assert seen == [0, 1, 1]


def test_who_goes_and_stays_away_holds_the_round_up_for_a_while_only(listed, monkeypatch):
    monkeypatch.setattr(exchanging, "RETURN_SECONDS", 0.3)
    link = there(Link(lambda assignment, message: [gone(message) if assignment.client else update(assignment, message)]), listed)
    traffic = Exchange(link, ASKED, NODES, "", 60.0, lambda: {0: 90})
    replies = list(traffic.replies)
    assert [reply.message.has_error() for reply in replies] == [False, True]
    assert replies[1].message.error.reason == "node_unavail"


def test_a_node_that_takes_no_message_has_not_answered(listed):
    link = there(Link(lambda assignment, message: [update(assignment, message)]), listed)
    link.facts["ben"] = facts(listed[1], 70, online=False)
    traffic = Exchange(link, ASKED, NODES, "", 5.0)
    assert [reply.message is None for reply in traffic.replies] == [False, True]


def test_the_task_is_json_and_nothing_else(tiny_config):
    from fedpeft.server.roster import task

    (array,) = task(tiny_config, "run1", ["a", "b"], 3).values()
    assert json.loads(array.tobytes())["clients"] == 3
