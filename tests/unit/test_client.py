"""A real client's own half: what it refuses, what it remembers, and that it runs nothing that a server names."""

import io
import json

import numpy as np
import pytest
import yaml
from flwr.app import Message

from fedpeft import Config, UserError, flower_private, wire
from fedpeft.client.history import State
from fedpeft.client.memory import Folder, Memory
from fedpeft.client.own_file import agree, load
from fedpeft.client.resident import WITHHELD, Resident
from fedpeft.records import Assignment, Failure, Update
from fedpeft.screen import Plain
from fedpeft.server.roster import task


@pytest.fixture
def own_file(tiny_bert, topics_csv, tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump({"data": {"name": str(topics_csv)}, "limits": {"models": [str(tiny_bert)], "max_steps": 50}}))
    return file


@pytest.fixture
def settings(tiny_settings):
    return {**tiny_settings, "strategy": {"name": "fedsmooth_lora", "num_rounds": 4}}


LABELS = ["money", "space", "sport"]


def said(settings, labels=LABELS, run="abc123"):
    return json.loads(task(Config.from_dict(settings), run, labels, 3)["task"].tobytes())


def test_what_the_server_tells_says_nothing_of_where_its_data_lies(settings):
    told = said(settings)
    assert set(told["config"]["data"]) == {"max_length", "validation_fraction"}
    assert str(settings["data"]["name"]) not in json.dumps(told)


def test_a_task_within_the_limits_is_run_on_the_clients_own_rows(own_file, settings):
    agreed = agree(load(own_file), said(settings))
    assert len(agreed.examples) == 96
    assert agreed.config.strategy.name == "fedsmooth_lora"
    assert agreed.config.training.max_steps == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"name": "someone/else"}}, "limits.models: the server wants to train"),
        ({"training": {"max_steps": 51}}, "limits.max_steps: the server wants 51"),
        ({"training": {"max_steps": 10, "gradient_accumulation_steps": 6}}, "limits.max_steps: the server wants 60"),
        ({"strategy": {"num_rounds": 101}}, "limits.max_rounds: the server wants 101"),
        ({"strategy": {"name": "evil.py:Strategy"}}, "code that is not part of fedpeft"),
        ({"strategy": {"name": "fedadam", "over": "evil.module:Strategy"}}, "code that is not part of fedpeft"),
        ({"training": {"optimizer": "os:system"}}, "code that is not part of fedpeft"),
        ({"adapter": {"name": "evil.py:Adapter"}}, "code that is not part of fedpeft"),
    ],
)
def test_what_goes_beyond_the_limits_is_refused_with_its_reason(change, says, own_file, settings):
    asked = said(settings)
    for section, keys in change.items():
        asked["config"][section] = {**asked["config"][section], **keys} if section != "strategy" else keys
    with pytest.raises(UserError, match=says):
        agree(load(own_file), asked)


PRIVATE = {"unit": "example", "target_epsilon": 2.5}


def asked_with(settings, privacy):
    training = {**settings["training"], "head_init": "random"}
    return said({**settings, "strategy": {"name": "fedavg", "num_rounds": 4}, "training": training, "privacy": privacy})


@pytest.fixture
def demanding(own_file):
    def write(**least):
        given = yaml.safe_load(own_file.read_text())
        given["limits"]["privacy"] = {"max_epsilon": 3, **least}
        own_file.write_text(yaml.safe_dump(given))
        return load(own_file)

    return write


def test_a_task_that_is_private_enough_is_agreed_to(demanding, settings):
    assert agree(demanding(), asked_with(settings, PRIVATE)).config.privacy.target_epsilon == 2.5
    noisy = agree(demanding(), asked_with(settings, {"noise_multiplier": 8.0})).config.privacy
    assert (noisy.noise_multiplier, noisy.target_epsilon) == (8.0, 3.0), "rounds that are played again end at the limit"
    assert agree(demanding(unit="client", max_epsilon=9), asked_with(settings, {"unit": "client", "target_epsilon": 8})).config.privacy


@pytest.mark.parametrize(
    ("least", "privacy", "says"),
    [
        ({}, None, r"^limits\.privacy: the server wants to train without differential privacy; allowed: epsilon 3 at most$"),
        ({}, {"target_epsilon": 4}, r"^limits\.privacy\.max_epsilon: 4 rounds would cost epsilon 3\.9\d*; allowed: at most 3$"),
        ({}, {"noise_multiplier": 0.0}, r"max_epsilon: 4 rounds would cost epsilon inf"),
        ({}, {"noise_multiplier": 0.7}, r"max_epsilon: 4 rounds would cost epsilon \d"),
        ({}, {**PRIVATE, "target_delta": 1e-3}, r"^limits\.privacy\.max_delta: the server wants delta 0\.001; allowed: at most 1e-05$"),
        ({}, {"unit": "client", "target_epsilon": 1}, r"^limits\.privacy\.unit: the server protects each client; allowed: each example$"),
        ({"unit": "client"}, PRIVATE, r"^limits\.privacy\.unit: the server protects each example; allowed: each client$"),
        ({"unit": "client"}, {"unit": "client", "noise_multiplier": 1.0}, r"max_epsilon: 4 rounds would cost epsilon"),
        ({}, {**PRIVATE, "insecure_seed": 1}, r"the server wants seeded noise"),
    ],
)
def test_less_privacy_than_the_client_asks_for_is_refused_in_one_line(least, privacy, says, demanding, settings):
    with pytest.raises(UserError, match=says) as caught:
        agree(demanding(**least), asked_with(settings, privacy))
    assert len(str(caught.value).splitlines()) == 1


def test_the_least_privacy_is_checked_like_the_rest_of_the_file(demanding):
    with pytest.raises(UserError, match=r"limits\.privacy\.max_epsilno .*allowed: max_epsilon, max_delta, unit"):
        demanding(max_epsilno=1)
    with pytest.raises(UserError, match=r"limits\.privacy\.max_delta .*less than 1"):
        demanding(max_delta=2)


def test_labels_that_the_task_does_not_have_are_refused(own_file, settings):
    with pytest.raises(UserError, match="the label 'space'"):
        agree(load(own_file), said(settings, ["money", "sport"]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"name": "nowhere.csv"}}, "there is no file nowhere.csv"),
        ({"limits": {"models": ["/nowhere"]}}, "/nowhere: there is no such folder"),
        ({"limits": {"max_stesp": 1}}, r"limits.max_stesp .*line \d+.*allowed: models, task, max_steps"),
        ({"limits": {"max_steps": 0}}, "limits.max_steps .*greater than or equal to 1"),
        ({"device": "cuda:77"}, "training.device"),
    ],
)
def test_mistakes_are_found_before_connecting(change, says, own_file):
    own_file.write_text(yaml.safe_dump({**yaml.safe_load(own_file.read_text()), **change}))
    with pytest.raises(UserError, match=says):
        load(own_file)


def message(assignment, base=""):
    return flower_private.stamp(wire.assignment_to_message(assignment, base, 7))


class Connected:
    """A resident client and a server that speaks to it, without a network."""

    def __init__(self, own_file, folder):
        flower_private.take_identity(1)
        self.screen = io.StringIO()
        self.folder = folder
        self.resident = Resident(load(own_file), folder, Plain(self.screen))

    def ask(self, assignment, base=None):
        base = base or (self.resident._worker.base if self.resident._worker else "")
        return wire.message_to_answer(self.resident.answer(message(assignment, base)))[0]

    def join(self, settings):
        return self.ask(Assignment(wire.JOIN, 0, 1, task(Config.from_dict(settings), "abc123", LABELS, 3)))

    def train(self, round, arrays=None):
        worker = self.resident._worker
        return self.ask(Assignment(wire.TRAIN, round, 1, arrays or worker.drawn))


@pytest.fixture
def connected(own_file, tmp_path):
    return Connected(own_file, Folder(tmp_path / "state"))


def same(one, other):
    return one.arrays.keys() == other.arrays.keys() and all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)


def test_a_round_that_is_asked_for_again_gets_the_same_answer(connected, settings):
    assert isinstance(connected.join(settings), Update)
    first, second = connected.train(1), connected.train(2)
    assert same(connected.train(2), second)
    assert same(connected.train(1), first)
    assert not same(first, second)


def test_a_client_that_is_started_anew_goes_on_where_it_was(connected, settings, own_file, tmp_path):
    connected.join(settings)
    connected.train(1)
    second = connected.train(2)
    connected.folder._lock.close()
    again = Connected(own_file, Folder(tmp_path / "state"))
    again.resident.recall()
    assert same(again.train(2), second)


def test_before_it_has_joined_a_client_does_nothing(connected):
    answer = connected.ask(Assignment(wire.TRAIN, 1, 1, {}))
    assert isinstance(answer, Failure) and answer.reason.startswith("missing task")


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (Assignment(wire.TRAIN, 5, 1, {}), "limits: round 5 of 4"),
        (Assignment(wire.TRAIN, 1, 2, {}), "wrong client"),
        (Assignment("census", 0, 1, {}), "asked for something else than agreed"),
    ],
)
def test_what_was_not_agreed_is_not_done(assignment, says, connected, settings):
    connected.join({**settings, "strategy": {"num_rounds": 4}})
    answer = connected.ask(Assignment(assignment.action, assignment.round, assignment.client, connected.resident._worker.drawn))
    assert isinstance(answer, Failure) and says in answer.reason, answer


def test_a_server_with_another_base_is_not_trained_for(connected, settings):
    connected.join(settings)
    answer = connected.ask(Assignment(wire.TRAIN, 1, 1, connected.resident._worker.drawn), base="feedbeef")
    assert "other base model" in answer.reason


def test_rounds_are_counted_on_this_machine(connected, settings, own_file):
    own = yaml.safe_load(own_file.read_text())
    own_file.write_text(yaml.safe_dump({**own, "limits": {**own["limits"], "max_rounds": 4}}))
    connected.resident.own = load(own_file)
    connected.join(settings)
    answers = [connected.train(1) for _ in range(5)]
    assert [type(answer) for answer in answers] == [Update] * 4 + [Failure]
    assert "limits.max_rounds is 4" in answers[-1].reason
    assert connected.resident._memory.trained == 4


@pytest.mark.parametrize("lost", ["the last line", "the file"])
def test_a_ledger_that_lost_its_end_is_not_taken_up_again(lost, connected, settings, own_file, tmp_path):
    private = {**settings, "strategy": {"name": "fedavg", "num_rounds": 4}, "privacy": {"noise_multiplier": 8.0}}
    private["training"] = {**settings["training"], "head_init": "random"}
    connected.join(private)
    assert [type(connected.train(round)) for round in (1, 2)] == [Update, Update]
    ledger = connected.resident._memory.ledger
    whole = ledger.read_bytes()
    connected.folder._lock.close()

    def anew():
        again = Connected(own_file, Folder(tmp_path / "state"))
        again.resident.recall()
        answer = again.join(private)
        again.folder._lock.close()
        return answer, again.screen.getvalue()

    assert isinstance(anew()[0], Update)
    ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:1])) if lost == "the last line" else ledger.unlink()
    refused, shown = anew()
    assert isinstance(refused, Failure) and "2 updates have left this machine" in shown
    ledger.write_bytes(whole)
    assert isinstance(anew()[0], Update)


def test_junk_is_answered_with_a_reason(connected):
    flower_private.take_identity(1)
    junk = flower_private.stamp(Message(wire.RecordDict(), 7, "train"))
    answer, _ = wire.message_to_answer(connected.resident.answer(junk))
    assert answer.reason.startswith("cannot be read")
    for arrays in (
        {},
        {"task": np.zeros(3, np.uint8)},
        {"task": np.frombuffer(b"[1, 2]", np.uint8)},
        {"task": np.frombuffer(b"{}", np.uint8)},
    ):
        assert "refused" in connected.ask(Assignment(wire.JOIN, 0, 1, arrays)).reason


def test_a_torn_memory_is_passed_over(tmp_path):
    folder = Folder(tmp_path)
    memory = Memory(folder, "run1")
    for round in range(1, 6):
        memory.write(round, State({"x": np.full(2, round)}, {"y": np.ones(1)}))
    files = sorted((tmp_path / "run1").glob("round-*"))
    assert len(files) == 3
    files[-1].write_bytes(files[-1].read_bytes()[:-3])
    again = Memory(folder, "run1")
    assert again.rounds.before(6).memory["x"][0] == 4
    assert again.rounds.before(4).memory["x"][0] == 3
    assert again.rounds.before(3) == State()


def test_a_line_that_was_torn_costs_itself_alone(tmp_path):
    memory = Memory(Folder(tmp_path), "run1")
    memory.note_sent({"action": "train", "failed": False})
    with (memory.path / "sent.jsonl").open("a") as file:
        file.write('{"time": 1.0, "act')
    memory.note_sent({"action": "train", "failed": False})
    assert memory.trained == 2


@pytest.mark.parametrize("run", ["outbox", "node", "a/b", ""])
def test_a_run_is_not_called_as_a_file_of_the_client(run, tmp_path):
    with pytest.raises(UserError, match="is no name of a run"):
        Memory(Folder(tmp_path), run)


def test_what_is_wrong_with_a_clients_own_rows_stays_there(connected, settings):
    """The server chooses the labels that it asks for: by asking again and again it could list those there are."""
    answer = connected.ask(Assignment(wire.JOIN, 0, 1, task(Config.from_dict(settings), "abc123", ["money", "sport"], 3)))
    assert isinstance(answer, Failure) and answer.reason == f"refused: {WITHHELD}"
    assert "the label 'space'" in connected.screen.getvalue()
    beyond = {**settings, "training": {**settings["training"], "max_steps": 51}}
    assert "limits.max_steps: the server wants 51" in connected.join(beyond).reason


def test_two_processes_do_not_share_a_memory(tmp_path):
    first = Folder(tmp_path)
    with pytest.raises(UserError, match="another client uses"):
        Folder(tmp_path)
    first._lock.close()


def test_what_is_resent_after_a_restart_is_the_same_message(connected, settings):
    """To the SuperLink the same object: an upload that was cut off is completed, and not a second answer."""
    connected.join(settings)
    reply = connected.resident.answer(
        message(Assignment(wire.TRAIN, 1, 1, connected.resident._worker.drawn), connected.resident._worker.base)
    )
    data = flower_private.to_bytes(reply)
    assert flower_private.from_bytes(data).object_id == reply.object_id == flower_private.from_bytes(data).object_id


def test_what_breaks_a_client_is_said_and_does_not_end_it(connected, settings):
    connected.join(settings)
    worker = connected.resident._worker
    wrong = {name: np.zeros((7, 7), np.float32) for name in worker.drawn}
    answer = connected.train(1, wrong)
    assert isinstance(answer, Failure) and "bro" in answer.reason, answer
    assert isinstance(connected.train(1), Update)


def test_a_server_evaluates_on_its_test_part_or_on_all_that_it_has(tiny_config, topics_csv):
    from fedpeft.data import corpus
    from fedpeft.tasks.sequence_classification import SequenceClassification

    data = tiny_config.data
    assert len(corpus.held_by_server(data, SequenceClassification(), 0)) == 24
    assert len(corpus.held_by_server(data.model_copy(update={"test_fraction": 0.0}), SequenceClassification(), 0)) == 96
