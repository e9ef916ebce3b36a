"""The round loop with real messages and clients that misbehave: each is left out alone, with its reason, and the round goes on."""

import dataclasses
import io
import json

import numpy as np
import pytest
from flwr.app import Error, Message

from fedpeft import Config, RunStopped, UserError, arrays, flower_private, wire
from fedpeft.records import Assignment, Update
from fedpeft.screen import Plain
from fedpeft.server import rounds, sampling
from fedpeft.server.exchange import Exchange
from fedpeft.server.federation import FINISHED, Survey
from fedpeft.server.run_folder import RunFolder
from fedpeft.simulations import run as simulation
from fedpeft.simulations.assemble import assemble
from fedpeft.simulations.grid import LocalGrid


class Tampered(LocalGrid):
    """The victim, (round, client), answers what `change` makes of its update; None: it never answers."""

    def __init__(self, worker, change, victim=(2, 1)):
        super().__init__(worker)
        self.change = change
        self.victim = victim

    def _answer(self, messages):
        replies = super()._answer(messages)
        changed = []
        for message, reply in zip(messages, replies, strict=True):
            assignment = wire.message_to_assignment(message)[0]
            if (assignment.round, assignment.client) == self.victim:
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


def test_the_global_adapter_is_the_average_of_the_accepted_weighted_by_examples(tiny_settings, tmp_path):
    """The golden number: round 2 of a run from which client 1 is missing, averaged again in six lines."""
    config = Config.from_dict({**tiny_settings, "strategy": {"num_rounds": 2}})
    seen = []

    def gone(asked, reply):
        return Message(Error(2, "gone"), reply_to=asked)

    class Watched(Tampered):
        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            seen.extend(reply for reply in replies if not reply.has_error())
            return replies

    parts = assemble(config)
    grid = Watched(parts.worker, gone)
    federation = simulation._federation(config, parts, lambda: grid.roster)
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    outcome = rounds.run(federation, grid, folder, Plain(io.StringIO()))
    updates = [update for update, _ in map(wire.message_to_answer, seen) if update.round == 2]
    assert sorted(update.client for update in updates) == [0, 2, 3]
    sizes = {update.client: len(parts.worker.nodes[update.client].train) for update in updates}
    assert len(set(sizes.values())) == 3, "unequal weights, or the test shows nothing"
    for name in updates[0].arrays:
        mean = sum(sizes[update.client] * update.arrays[name].astype(np.float64) for update in updates) / sum(sizes.values())
        np.testing.assert_allclose(outcome.arrays[name], mean, atol=1e-7)


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
    with pytest.raises(RunStopped, match="asked for something else than agreed: census"):
        rounds.run(
            dataclasses.replace(federation, surveys=(Survey("census", {}, lambda total: {}),)),
            grid,
            folder,
            Plain(io.StringIO()),
        )


def test_a_short_run_in_which_nobody_moves_is_not_called_finished(tiny_settings, tmp_path):
    config = Config.from_dict(
        {**tiny_settings, "strategy": {"num_rounds": 1}, "training": {**tiny_settings["training"], "learning_rate": 0}}
    )
    outcome, _ = play(config, tmp_path)
    assert outcome.stopped_because != FINISHED


def test_a_stopped_run_resumes_to_where_it_stopped(tiny_settings, tmp_path):
    config = Config.from_dict(
        {**tiny_settings, "strategy": {"num_rounds": 9}, "training": {**tiny_settings["training"], "learning_rate": 0}}
    )
    outcome, federation = play(config, tmp_path)
    again = rounds.run(federation, LocalGrid(assemble(config).worker), RunFolder(tmp_path / "run"), Plain(io.StringIO()))
    assert [record.round for record in again.records] == [record.round for record in outcome.records]
    assert again.stopped_because == outcome.stopped_because


@pytest.mark.parametrize(("field", "says"), [("base", "base model"), ("data", "data")])
def test_a_run_is_not_resumed_on_another_base_or_other_data(field, says, tiny_config, tmp_path):
    _, federation = play(tiny_config, tmp_path)
    other = dataclasses.replace(federation, **{field: "other"})
    with pytest.raises(UserError, match=f"another {says}"):
        rounds.run(other, None, RunFolder(tmp_path / "run"), Plain(io.StringIO()))


def test_a_run_that_lost_lines_is_not_resumed(tiny_config, tmp_path):
    _, federation = play(tiny_config, tmp_path)
    file = tmp_path / "run" / "rounds.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match="has lost rounds: 2 of 4"):
        rounds.run(federation, None, RunFolder(tmp_path / "run"), Plain(io.StringIO()))


def test_too_few_clients_stop_the_run_after_its_timeout(tiny_settings, tmp_path):
    config = Config.from_dict({**tiny_settings, "strategy": {"min_available_nodes": 4, "round_timeout": 0.1}})
    parts = assemble(config)
    federation = simulation._federation(config, parts, lambda: {0: 1000})
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    with pytest.raises(RunStopped, match=r"1 clients after 0 s, strategy\.min_available_nodes is 4"):
        rounds.run(federation, LocalGrid(parts.worker), folder, Plain(io.StringIO()))


@pytest.mark.parametrize("name", ["nan", "raised", "junk", "missing tensor"])
def test_a_client_that_spoils_the_survey_is_left_out_alone(name, tiny_settings, tmp_path):
    settings = {**tiny_settings, "training": {**tiny_settings["training"], "head_init": "class_statistics", "learning_rate": 1e-4}}
    config = Config.from_dict(settings)
    parts = assemble(config)
    grid = Tampered(parts.worker, MISBEHAVIOURS[name][0], victim=(0, 0))
    federation = simulation._federation(config, parts, lambda: grid.roster)
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    outcome = rounds.run(federation, grid, folder, Plain(io.StringIO()))
    assert (outcome.records[0].asked, outcome.records[0].accepted) == (4, 3)
    assert [record.accepted for record in outcome.records[1:]] == [4, 4, 4]


def test_validation_metrics_are_means_over_the_clients_that_have_them(tiny_settings, tmp_path):
    config = Config.from_dict({**tiny_settings, "data": {**tiny_settings["data"], "validation_fraction": 0.06}})
    outcome, _ = play(config, tmp_path)
    nodes = assemble(config).worker.nodes.values()
    assert {node.validation is None for node in nodes} == {True, False}, "some clients are too small to keep any"
    assert 0 <= outcome.records[1].report["clients_validation_accuracy"] <= 1


def test_bytes_are_those_of_the_serialised_messages(tiny_config):
    parts = assemble(tiny_config)
    grid = LocalGrid(parts.worker)
    asked = [Assignment("train", 1, client, parts.adapted.read()) for client in grid.roster]
    traffic = Exchange(grid, asked, grid.roster, parts.worker.base, 10.0)
    assert len(list(traffic.replies)) == 4
    plain = sum(array.nbytes for array in parts.adapted.read().values())
    assert 4 * plain < traffic.bytes_down < 4 * (plain + 4000)
    assert 4 * plain < traffic.bytes_up < 4 * (plain + 4000)


def test_what_a_client_changes_in_place_reaches_nobody_else(tiny_config):
    parts = assemble(tiny_config)
    start = parts.adapted.read()
    before = arrays.digest(start)

    class Vandal:
        nodes, base, cohort = parts.worker.nodes, parts.worker.base, 3
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
    list(Exchange(grid, [Assignment("train", 1, client, start) for client in grid.roster], grid.roster, "x", 10.0).replies)
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


def test_what_a_run_starts_from_is_what_the_seed_gave_however_often_it_starts(tiny_config):
    """The model holds whatever was evaluated last when a server goes on after its run was lost."""
    parts = assemble(tiny_config)
    first = simulation._federation(tiny_config, parts, dict).arrays
    parts.adapted.write({name: array + 1 for name, array in first.items()})
    second = simulation._federation(tiny_config, parts, dict).arrays
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_an_empty_config_is_no_run(tiny_config, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create(tiny_config)
    folder.config.write_text("")
    with pytest.raises(UserError, match="holds no run"):
        folder.reopen(Config.load())
