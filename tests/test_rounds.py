"""The round loop with real messages and clients that misbehave: each is left out alone, with its reason, and the round goes on."""

import dataclasses
import io
import json

import numpy as np
import pytest
from flwr.app import Error, Message

from fedpeft import Config, RunStopped, arrays, flower_private, wire
from fedpeft.records import Update
from fedpeft.screen import Plain
from fedpeft.server import rounds, sampling
from fedpeft.server.exchange import exchange
from fedpeft.server.run_folder import RunFolder
from fedpeft.simulations import run as simulation
from fedpeft.simulations.assemble import assemble
from fedpeft.simulations.grid import LocalGrid


class Tampered(LocalGrid):
    """Client 1 answers what `change` makes of its update in round 2; None: it never answers."""

    def __init__(self, worker, change):
        super().__init__(worker)
        self.change = change

    def _answer(self, messages):
        replies = super()._answer(messages)
        changed = []
        for message, reply in zip(messages, replies, strict=True):
            assignment = wire.message_to_assignment(message)[0]
            if (assignment.round, assignment.client) == (2, 1):
                reply = self.change(message, reply)
            if reply is not None:
                changed.append(flower_private.stamp(reply))
        return changed


def rewritten(**fields):
    """A change that replaces fields of the update."""

    def change(asked, reply):
        update, base = wire.message_to_answer(reply)
        new = {name: value(update) if callable(value) else value for name, value in fields.items() if name != "base"}
        return wire.answer_to_message(dataclasses.replace(update, **new), fields.get("base", base), asked)

    return change


def with_first_tensor(make):
    def change(update):
        name = min(update.arrays)
        return {**update.arrays, name: make(update.arrays[name])}

    return change


def as_received(asked, reply):
    update, base = wire.message_to_answer(reply)
    received = wire.message_to_assignment(asked)[0].arrays
    same = {name: received[name] for name in update.arrays}
    return wire.answer_to_message(dataclasses.replace(update, arrays=same), base, asked)


def play(config, tmp_path, change=lambda asked, reply: reply):
    parts = assemble(config)
    grid = Tampered(parts.worker, change)
    federation = simulation._federation(config, parts, lambda: grid.roster)
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    return rounds.run(federation, grid, folder, Plain(io.StringIO())), federation


MISBEHAVIOURS = {
    "nan": (rewritten(arrays=with_first_tensor(lambda a: a * np.nan)), "not finite: a tensor"),
    "infinite": (rewritten(arrays=with_first_tensor(lambda a: a + np.inf)), "not finite: a tensor"),
    "nan loss": (rewritten(metrics={"loss": float("nan")}), "not finite: a metric"),
    "missing tensor": (rewritten(arrays=lambda u: dict(list(sorted(u.arrays.items()))[1:])), "wrong tensors"),
    "extra tensor": (rewritten(arrays=lambda u: {**u.arrays, "zzz": np.zeros(1, np.float32)}), "wrong tensors: zzz"),
    "broadcastable shape": (rewritten(arrays=with_first_tensor(lambda a: a[:1])), "wrong tensors"),
    "transposed": (rewritten(arrays=with_first_tensor(lambda a: a.T)), "wrong tensors"),
    "other dtype": (rewritten(arrays=with_first_tensor(lambda a: a.astype(np.float64))), "wrong tensors"),
    "no examples": (rewritten(examples=0), "absurd weight: 0"),
    "too many examples": (rewritten(examples=10**12), "absurd weight"),
    "huge update": (rewritten(arrays=with_first_tensor(lambda a: a + 1e30)), "over norm"),
    "stale round": (rewritten(round=1), "stale: answers round 1 in round 2"),
    "another's name": (rewritten(client=3), "wrong client: answers for 3"),
    "other base": (rewritten(base="feedbeef"), "other base model: fingerprint feedbeef"),
    "did not move": (as_received, "did not move"),
    "raised": (lambda asked, reply: Message(Error(2, "boom"), reply_to=asked), "client failed: boom"),
    "junk": (lambda asked, reply: Message(wire.RecordDict(), reply_to=asked), "malformed"),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_misbehaving_client_is_left_out_alone(name, tiny_config, tmp_path):
    change, reason = MISBEHAVIOURS[name]
    outcome, _ = play(tiny_config, tmp_path, change)
    second = outcome.records[2]
    assert (second.asked, second.accepted) == (4, 3)
    assert second.rejected_clients["1"].startswith(reason), second.rejected_clients
    assert sum(second.rejected.values()) == 1
    assert [record.accepted for record in outcome.records[1:]] == [4, 3, 4]
    assert all(np.isfinite(array).all() for array in outcome.arrays.values())
    line = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[2])
    assert line["rejected_clients"] == second.rejected_clients


def test_a_client_that_never_answers_costs_the_round_only_its_timeout(tiny_settings, tmp_path):
    config = Config.from_dict({**tiny_settings, "strategy": {"num_rounds": 3, "round_timeout": 0.5}})
    outcome, _ = play(config, tmp_path, lambda asked, reply: None)
    assert outcome.records[2].rejected == {"no answer in time": 1}
    assert outcome.records[2].accepted == 3


def test_an_average_without_the_bad_client_is_the_average_of_the_others(tiny_config, tmp_path):
    collected = {}

    def spy_then_spoil(asked, reply):
        return Message(Error(2, "gone"), reply_to=asked)

    parts = assemble(tiny_config)
    grid = Tampered(parts.worker, spy_then_spoil)
    federation = simulation._federation(tiny_config, parts, lambda: grid.roster)
    combine = type(parts.strategy).combine

    class Spy(type(parts.strategy)):
        def combine(self, updates, received):
            collected[updates[0].round] = updates
            return combine(self, updates, received)

    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_config)
    rounds.run(dataclasses.replace(federation, strategy=Spy()), grid, folder, Plain(io.StringIO()))
    assert [update.client for update in collected[2]] == [0, 2, 3]
    assert [update.client for update in collected[1]] == [0, 1, 2, 3]


def test_a_round_below_min_train_nodes_leaves_the_global_state_untouched(tiny_settings, tmp_path):
    config = Config.from_dict({**tiny_settings, "strategy": {"num_rounds": 2, "min_train_nodes": 4}})
    outcome, _ = play(config, tmp_path, MISBEHAVIOURS["nan"][0])
    first, second = outcome.records[1:]
    assert second.accepted == 3
    assert second.update_norm == 0.0
    assert second.metrics == first.metrics


def test_a_run_in_which_nobody_moves_stops_and_says_why(tiny_settings, tmp_path):
    config = Config.from_dict(
        {**tiny_settings, "strategy": {"num_rounds": 9}, "training": {**tiny_settings["training"], "learning_rate": 0}}
    )
    outcome, _ = play(config, tmp_path)
    assert len(outcome.records) == 1 + rounds.MAX_EMPTY_ROUNDS
    assert "did not move" in outcome.stopped_because


def test_a_survey_that_nobody_answers_stops_the_run(tiny_config, tmp_path):
    parts = assemble(tiny_config)
    grid = LocalGrid(parts.worker)
    federation = simulation._federation(tiny_config, parts, lambda: grid.roster)
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_config)
    with pytest.raises(RunStopped, match="asked for something unknown: census"):
        rounds.run(
            dataclasses.replace(federation, survey=rounds.Survey("census", lambda total: {})),
            grid,
            folder,
            Plain(io.StringIO()),
        )


def test_too_few_clients_stop_the_run_after_its_timeout(tiny_settings, tmp_path):
    config = Config.from_dict({**tiny_settings, "strategy": {"min_available_nodes": 5, "round_timeout": 0.1}})
    with pytest.raises(RunStopped, match=r"4 clients after 0 s, strategy\.min_available_nodes is 5"):
        play(config, tmp_path)


def test_bytes_are_those_of_the_serialised_messages(tiny_config):
    parts = assemble(tiny_config)
    grid = LocalGrid(parts.worker)
    asked = [rounds.Assignment("train", 1, client, parts.adapted.read()) for client in grid.roster]
    traffic = exchange(grid, asked, grid.roster, parts.worker.base, 10.0)
    plain = sum(array.nbytes for array in parts.adapted.read().values())
    assert 4 * plain < traffic.bytes_down < 4 * (plain + 4000)
    assert 4 * plain < traffic.bytes_up < 4 * (plain + 4000)


def test_what_a_client_changes_in_place_reaches_nobody_else(tiny_config):
    parts = assemble(tiny_config)
    start = parts.adapted.read()
    before = arrays.digest(start)

    class Vandal:
        nodes, base = parts.worker.nodes, parts.worker.base
        seen = []

        def answer(self, assignments):
            answers = []
            for assignment in assignments:
                self.seen.append(arrays.digest(assignment.arrays))
                mine = {name: np.array(array) for name, array in assignment.arrays.items()}
                answers.append(Update(assignment.round, assignment.client, mine, 1, {"loss": 0.0}))
                for array in assignment.arrays.values():
                    if array.flags.writeable:
                        array += 1
            return answers

    grid = LocalGrid(Vandal())
    exchange(grid, [rounds.Assignment("train", 1, client, start) for client in grid.roster], grid.roster, "x", 10.0)
    assert set(Vandal.seen) == {before} == {arrays.digest(start)}


@pytest.mark.parametrize(
    ("available", "fraction", "minimum", "expected"), [(10, 1.0, 1, 10), (10, 0.3, 1, 3), (10, 0.25, 1, 3), (10, 0.1, 4, 4), (3, 0.1, 9, 3)]
)
def test_sample_sizes(available, fraction, minimum, expected):
    chosen = sampling.choose(range(available), fraction, minimum, seed=0, round=1)
    assert len(chosen) == len(set(chosen)) == expected
    assert chosen == sorted(chosen)


def test_every_client_is_sampled_about_as_often():
    counts = np.bincount([client for round in range(2000) for client in sampling.choose(range(10), 0.3, 1, 0, round)])
    assert counts.sum() == 6000
    assert np.abs(counts - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_sampling_does_not_depend_on_the_order_of_the_roster():
    assert sampling.choose([3, 1, 2, 9, 7], 0.5, 1, 0, 4) == sampling.choose([9, 7, 3, 2, 1], 0.5, 1, 0, 4)
