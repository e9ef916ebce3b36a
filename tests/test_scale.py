"""Many clients: what a round keeps of their updates, counted in arrays that are alive, and that nothing else comes of it."""

import io
import json
import weakref

import numpy as np
import pytest

from fedpeft import Config, arrays, simulate, wire
from fedpeft.client import worker
from fedpeft.lookup import TABLES, find
from fedpeft.records import Assignment, Layout, Pair, TensorSpec, Update, sparse_name
from fedpeft.screen import Plain
from fedpeft.server import rounds
from fedpeft.server.exchange import Exchange
from fedpeft.strategies.fedavg import FedAvg
from fedpeft.strategies.strategy import Round

CLIENTS = 40
A, B, CORE, HEAD = "m.A", "m.B", "m.core", "head"
STREAMING = {"fedavg", "ffa_lora", "ro_lora", "fed_svd", "fedsa_lora", "slora", "fed_sb"}  # sums of uploads, and nothing else
STREAMING |= {"fedprox", "scaffold", "fedavgm", "fedadam", "fedyogi", "fedadagrad"}  # each over fedavg
NAMES = sorted(TABLES["strategy"])


def strategy_called(name):
    target = find("strategy", name)
    return target(of="factors") if "of" in target.model_fields else target()


class Case:
    """A round of CLIENTS random updates of one 24 x 24 matrix, r = 4, and a head."""

    def __init__(self, name, number=5):
        self.strategy = strategy_called(name)
        shapes = {A: (4, 24), B: (24, 4), HEAD: (3,)} | ({CORE: (4, 4)} if self.strategy.of_cores else {})
        self.received = {key: self.drawn(key, shape) for key, shape in shapes.items()}
        pair = Pair("m", A, B, 2.0, 4, core=CORE if self.strategy.of_cores else None)
        positions = self.strategy.sparse(Layout({key: TensorSpec(s, "float32") for key, s in shapes.items()}, (pair,)), 0)
        self.received |= {sparse_name(module): np.zeros(len(where), np.float32) for module, where in positions.items()}
        layout = Layout(Layout.specs(self.received), (pair,))
        self.at = Round(number, 10, layout, clients=CLIENTS)
        trained = [key for key in layout.tensors if not self.strategy.of_cores or key in (CORE, HEAD)]
        self.specs = {**self.strategy.uploads(trained, self.at), **self.strategy.answers(self.at)}
        self.received |= self.strategy.extras({key: self.received[key] for key in trained})

    @staticmethod
    def drawn(purpose, shape):
        return np.random.default_rng(list(purpose.encode())).standard_normal(shape, np.float32)

    def updates(self):
        for client in range(CLIENTS):
            yield Update(
                self.at.number, client, {key: self.drawn(f"{key} {client}", s.shape) for key, s in self.specs.items()}, 1 + client % 7
            )

    def combine(self, updates):
        question = self.strategy.second(list(self.updates()), self.at)
        return self.strategy.combine(updates, {**self.received, **question}, self.at)


class Watch:
    """Counts, of the arrays it was shown, those that are alive."""

    def __init__(self):
        self.alive, self.most, self.seen = 0, 0, 0

    def show(self, update):
        for array in update.arrays.values():
            weakref.finalize(array, self.gone)
            self.alive, self.seen = self.alive + 1, self.seen + 1
        self.most = max(self.most, self.alive)
        return update

    def gone(self):
        self.alive -= 1


@pytest.mark.parametrize("name", NAMES)
def test_updates_that_come_one_by_one_make_the_same_bits(name):
    """Which strategies stream is a list here, so that none does, or ceases to, by accident."""
    case = Case(name)
    assert case.strategy.streams == (name in STREAMING)
    together = case.combine(list(case.updates()))
    if not case.strategy.streams:
        return
    single = case.combine(case.updates())
    assert arrays.digest(single.arrays) == arrays.digest(together.arrays)
    assert single.report.keys() == together.report.keys()


@pytest.mark.parametrize("name", sorted(STREAMING))
def test_a_strategy_that_streams_keeps_no_update(name):
    case, watch = Case(name), Watch()
    case.combine(map(watch.show, case.updates()))
    assert watch.seen == CLIENTS * len(case.specs)
    assert watch.most <= 2 * len(case.specs), "the one that is counted and the one that comes"
    assert watch.alive == 0


def test_the_count_of_arrays_sees_a_strategy_that_keeps_its_updates():
    case, watch = Case("fedavg"), Watch()
    case.combine([watch.show(update) for update in case.updates()])
    assert watch.most == CLIENTS * len(case.specs)


@pytest.mark.parametrize("name", sorted(STREAMING - {"fedsa_lora"}))
def test_the_error_is_estimated_where_it_is_not_measured(name):
    case = Case(name)
    measured = case.combine(list(case.updates())).report["aggregation_error"]
    estimated = case.combine(case.updates()).report["aggregation_error"]
    assert estimated == pytest.approx(measured, rel=0.5, abs=1e-6)
    assert (estimated < 1e-6) == (measured < 1e-6), "what is exact is seen to be"


def test_the_estimate_is_right_on_average():
    """Over draws of the directions: the ratio of the mean squares is 1 within three standard errors."""
    case = Case("fedavg")
    measured = case.combine(list(case.updates())).report["aggregation_error"]
    squares = []
    for number in range(200):
        case.at = Round(number, 200, case.at.layout)
        squares.append((case.combine(case.updates()).report["aggregation_error"] / measured) ** 2)
    assert abs(np.mean(squares) - 1) < 3 * np.std(squares) / np.sqrt(len(squares)) + 0.02  # the ratio of two estimates leans by a little


class Own(FedAvg):
    """A strategy of somebody who knows nothing of streaming."""

    def combine(self, updates, received, at):
        assert len(updates) == len(list(updates))
        return super().combine(updates, received, at)


def test_a_subclass_with_a_combine_of_its_own_is_given_all_updates():
    assert FedAvg().streams
    assert not Own().streams


# --- whole rounds ----------------------------------------------------------------------------------------------------


@pytest.fixture
def many_clients(tiny_settings):
    """Thirty-six clients of two examples each."""
    return {
        **tiny_settings,
        "partition": {"name": "iid", "clients": 36},
        "strategy": {"name": "fedavg", "num_rounds": 2},
        "training": {**tiny_settings["training"], "max_steps": 1, "head_init": "class_statistics"},
    }


def played(settings, out):
    heard = io.StringIO()
    run = simulate(Config.from_dict(settings), out, screen=Plain(heard))
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return arrays.digest(run.arrays), lines, heard.getvalue()


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "lora_fair", "fed_ask"])
def test_cohorts_and_streaming_change_no_bit(many_clients, tmp_path, monkeypatch, name):
    config = {**many_clients, "strategy": {"name": name, "num_rounds": 2}}
    monkeypatch.setattr(rounds, "HELD", 1000)
    together, before, _ = played(config, tmp_path / "together")
    monkeypatch.setattr(rounds, "HELD", 4)
    monkeypatch.setattr(worker, "FEWEST", 5)
    monkeypatch.setattr(worker, "MOST", 5)
    apart, after, _ = played(config, tmp_path / "apart")
    assert apart == together
    for one, other in zip(before, after, strict=True):
        for said in (one, other):
            said["report"].pop("aggregation_error", None)
            said["report"].pop("clients_seconds", None)
            del said["seconds"], said["bytes_up"]  # seconds of training travel as text
        assert one == other


def test_a_round_reads_one_answer_after_another(many_clients, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "HELD", 4)
    read, watch, tensors = wire.message_to_answer, Watch(), []

    def watching(message):
        answer, base = read(message)
        tensors.append(len(answer.arrays))
        return watch.show(answer), base

    monkeypatch.setattr(wire, "message_to_answer", watching)
    played(many_clients, tmp_path / "run")
    assert len(tensors) == 36 * 3, "the survey and two rounds"
    assert watch.most <= 2 * max(tensors)


def test_few_of_many_clients_are_listed(many_clients, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "LISTED", 5)
    monkeypatch.setattr(rounds, "NOTED", 2)
    many_clients["strategy"] |= {"max_update_norm": 1e-6}
    many_clients["training"] |= {"head_init": "random"}
    _, lines, heard = played(many_clients, tmp_path / "run")
    first = lines[1]
    assert (first["asked"], first["accepted"], first["rejected"]) == (36, 0, {"over norm": 36})
    assert len(first["rejected_clients"]) == 5
    assert heard.count("round 1: client") == 2
    assert "round 1: 34 more clients left out" in heard
    del many_clients["strategy"]["max_update_norm"]
    _, lines, _ = played(many_clients, tmp_path / "whole")
    assert (lines[1]["accepted"], len(lines[1]["client_update_norms"])) == (36, 5)


class Waiting:
    """A grid of cohorts of three, two ahead, in which the later cohort is done first."""

    cohorts_at_once = 2

    def cohort(self, asked):
        return 3

    def __init__(self):
        self.out, self.pushes, self.most = {}, [], 0

    def push_messages(self, messages):
        read = [wire.message_to_assignment(message)[0] for message in messages]
        self.pushes.append([assignment.client for assignment in read])
        ids = [f"message {assignment.client}" for assignment in read]
        self.out |= dict(zip(ids, messages, strict=True))
        self.most = max(self.most, len(self.out))
        return ids

    def pull_messages(self, message_ids):
        last = sorted((message_id for message_id in message_ids if message_id in self.out), key=lambda one: int(one.split()[1]))[-3:]
        return [self.reply(self.out.pop(message_id), message_id) for message_id in last]

    def reply(self, message, message_id):
        message.metadata.__dict__["_message_id"] = message_id
        assignment, base = wire.message_to_assignment(message)
        return wire.answer_to_message(Update(1, assignment.client, assignment.arrays, 1), base, message)


def test_cohorts_are_asked_in_turn_and_heard_in_the_order_of_clients(monkeypatch):
    from fedpeft import flower_private

    flower_private.take_identity(1)
    monkeypatch.setattr(wire, "POLL_SECONDS", 0.0)
    grid, asked = Waiting(), [Assignment("train", 1, client, {"x": np.full(1, client, np.float32)}) for client in (5, 3, 8, 1, 0, 9, 2, 7)]
    replies = list(Exchange(grid, asked, {client: 100 + client for client in range(10)}, "base", 10.0).replies)
    assert [reply.asked.client for reply in replies] == [0, 1, 2, 3, 5, 7, 8, 9]
    assert [wire.message_to_answer(reply.message)[0].client for reply in replies] == [0, 1, 2, 3, 5, 7, 8, 9]
    assert grid.pushes == [[0, 1, 2], [3, 5, 7], [8, 9]], "whom a client is trained with does not depend on who was done first"
    assert grid.most == 6
