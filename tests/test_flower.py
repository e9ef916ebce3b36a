"""Our strategies under Flower's own `Strategy.start`, with a plain Flower ClientApp; and the private names we touch are there."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedpeft import UserError, flower_private
from fedpeft.strategies import flower
from fedpeft.strategies.flower_strategy import layout_of
from fedpeft.strategies.strategy import Round, Turn

A, B, HEAD = "layer.lora_A.weight", "layer.lora_B.weight", "head.weight"
CLIENTS = 5


def initial():
    generator = np.random.default_rng(0)
    return {A: generator.normal(size=(2, 6)), B: generator.normal(size=(4, 2)), HEAD: generator.normal(size=(3, 4))}


def client_app(behave=lambda node, arrays: arrays):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = context.node_id
        generator = np.random.default_rng([node, message.content["config"]["server-round"]])
        own = initial() | {name: array.numpy() for name, array in message.content["arrays"].items()}
        trained = {name: own[name] + 0.1 * generator.normal(size=own[name].shape) for name in message.content["config"]["trains"]}
        arrays = ArrayRecord({name: Array(array) for name, array in behave(node, trained).items()})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10 * node})}), reply_to=message)

    return app


class AppGrid(Grid):
    """A Flower ClientApp in this process."""

    def __init__(self, app):
        flower_private.take_identity(1)
        self.app, self.replies, self.run_, self.sent = app, {}, None, []

    def get_node_ids(self):
        return list(range(1, CLIENTS + 1))

    def context(self, node):
        return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})

    def push_messages(self, messages):
        ids = []
        for message in map(flower_private.stamp, messages):
            self.sent.append(message)
            arrived = flower_private.from_bytes(flower_private.to_bytes(message))
            reply = flower_private.stamp(self.app(message=arrived, context=self.context(message.metadata.dst_node_id)))
            self.replies[message.metadata.message_id] = flower_private.from_bytes(flower_private.to_bytes(reply))
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def create_message(self, *arguments):
        raise AssertionError("deprecated in Flower, and not used by it")

    def set_run(self, run):
        self.run_ = run

    @property
    def run(self):
        return self.run_


def play(strategy, app=None, num_rounds=2):
    grid = AppGrid(app or client_app())
    result = strategy.start(grid, ArrayRecord({name: Array(array) for name, array in initial().items()}), num_rounds=num_rounds)
    return {name: array.numpy() for name, array in result.arrays.items()}, result, grid


NAMES = {"fedavg": {}, "ffa_lora": {}, "lora_fair": {"regularisation": 0.0}, "ro_lora": {}, "fed_svd": {}, "fedadam": {"over": "ffa_lora"}}


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_runs_under_flowers_own_start(name):
    strategy = flower(name, **NAMES[name])
    assert isinstance(strategy, Strategy)
    arrays, result, _ = play(strategy)
    before = initial()
    assert arrays.keys() == before.keys()
    assert any(not np.array_equal(arrays[key], before[key]) for key in arrays)
    assert "aggregation_error" in result.train_metrics_clientapp[2]


SCALING = 2.0


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "fedsmooth_lora", "slora"])
def test_a_strategy_that_merges_has_to_know_the_scaling(name):
    with pytest.raises(UserError, match=rf"^scaling: none, and {name} moves part of the update .* lora_alpha / r"):
        flower(name)


def test_what_is_merged_is_in_units_of_the_weights():
    """The whole update of FLoRA, s B A and what is merged, is the mean of the clients' s B A."""
    app, came = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        draw = np.random.default_rng(context.node_id)
        arrays = {name: draw.normal(size=initial()[name].shape) for name in message.content["config"]["uploads"]}
        came.append(arrays)
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return Message(RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 10})}), reply_to=message)

    arrays, _, _ = play(flower("flora", scaling=SCALING), app, num_rounds=1)
    (left,) = (name for name in arrays if name.endswith(".left"))
    whole = arrays[left] @ arrays[left.removesuffix("left") + "right"] + SCALING * arrays[B] @ arrays[A]
    np.testing.assert_allclose(whole, np.mean([SCALING * one[B] @ one[A] for one in came], axis=0), atol=1e-9)


def client_app_with_a_half(strategy, rate=0.5):
    """An app whose clients call their half of `strategy`: gradients are noise, a step is plain descent."""
    app, memories, turns = ClientApp(), {}, {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node, config = context.node_id, message.content["config"]
        received = {name: array.numpy() for name, array in message.content["arrays"].items()}
        if config.get("action") == "second":
            upload = strategy.answer(replace(turns[node], memory=memories[node]), received)
        else:
            layout = layout_of({**initial(), **{n: a for n, a in received.items() if n.startswith("sparse.")}}, SCALING)
            at = Round(config["server-round"], 3, layout, 0, CLIENTS)
            turns[node] = turn = Turn(at, initial() | received, memories.get(node, {}), lambda arrays, batches: iter(()), rate)
            start, drift = strategy.begin(turn), strategy.drift(turn)
            generator = np.random.default_rng([node, at.number])
            gradients = {name: generator.normal(size=start[name].shape) + drift.get(name, 0) for name in config["trains"]}
            trained = {name: start[name] - rate * gradient for name, gradient in gradients.items()}
            upload, memories[node] = strategy.end(turn, start, trained)
            upload = {name: upload[name] for name in config["uploads"]}
        arrays = ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in upload.items()})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 10 * node})}), reply_to=message)

    return app


@pytest.mark.parametrize(
    ("name", "own"), [("fed_ask", {}), ("scaffold", {}), ("fedsa_lora", {}), ("slora", {"warmup_rounds": 1}), ("flora", {})]
)
def test_a_strategy_with_a_half_at_the_client_runs_in_an_app_that_calls_it(name, own):
    strategy = flower(name, scaling=SCALING, **own)
    arrays, _, grid = play(strategy, client_app_with_a_half(strategy.strategy), num_rounds=3)
    before = initial()
    assert not np.array_equal(arrays[A], before[A])
    assert np.array_equal(arrays[B], before[B]) == (name == "fedsa_lora")
    assert len(grid.sent) == CLIENTS * 3 * (2 if name == "fed_ask" else 1)


def test_the_control_variate_of_an_app_is_the_mean_gradient_of_its_clients():
    strategy = flower("scaffold", min_available_nodes=CLIENTS)
    arrays, _, _ = play(strategy, client_app_with_a_half(strategy.strategy), num_rounds=1)
    drawn = [np.random.default_rng([node, 1]) for node in range(1, CLIENTS + 1)]
    for name in sorted([A, B, HEAD]):
        wanted = sum(generator.normal(size=initial()[name].shape) for generator in drawn) / CLIENTS
        np.testing.assert_allclose(arrays[f"beside.control.{name}"], wanted, atol=1e-5)


def test_the_mean_is_weighted_by_examples():
    arrays, _, _ = play(flower("fedavg"), num_rounds=1)
    trained = []
    for node in range(1, CLIENTS + 1):
        generator = np.random.default_rng([node, 1])
        own = initial()
        trained.append((10 * node, {name: own[name] + 0.1 * generator.normal(size=own[name].shape) for name in sorted(own)}))
    for name in arrays:
        np.testing.assert_allclose(arrays[name], sum(n * client[name] for n, client in trained) / sum(n for n, _ in trained), atol=1e-12)


def test_ffa_sends_no_A_and_leaves_it_alone():
    arrays, _, grid = play(flower("ffa_lora"))
    assert np.array_equal(arrays[A], initial()[A])
    assert all(A not in message.content["arrays"] for message in grid.sent)


def test_fedsvd_leaves_orthonormal_rows():
    arrays, result, _ = play(flower("fed_svd"))
    np.testing.assert_allclose(arrays[A] @ arrays[A].T, np.eye(2), atol=1e-12)
    assert result.train_metrics_clientapp[1]["aggregation_error"] < 1e-12


def test_one_bad_client_is_left_out():
    spoil = client_app(lambda node, arrays: {name: array * np.nan for name, array in arrays.items()} if node == 3 else arrays)
    arrays, _, _ = play(flower("fedavg"), spoil)
    assert all(np.isfinite(array).all() for array in arrays.values())
    short = client_app(lambda node, arrays: {name: array for name, array in arrays.items() if node != 3 or name != HEAD})
    kept, _, _ = play(flower("fedavg"), short)
    for name in arrays:
        np.testing.assert_allclose(kept[name], arrays[name])


def test_an_unknown_name_is_one_line():
    with pytest.raises(UserError, match='did you mean "lora_fair"'):
        flower("lorafair")


def test_an_adapter_without_factors_is_refused_where_factors_are_needed():
    strategy = flower("ffa_lora")
    with pytest.raises(UserError, match="works on LoRA factors"):
        strategy.start(AppGrid(client_app()), ArrayRecord({HEAD: Array(np.ones((2, 2)))}), num_rounds=1)


def test_private_names_of_flower_are_where_we_think():
    flower_private.take_identity(7)
    message = flower_private.stamp(Message(RecordDict({"config": ConfigRecord({"x": 1})}), dst_node_id=3, message_type="train"))
    assert message.metadata.run_id == 7
    again = flower_private.from_bytes(flower_private.to_bytes(message))
    assert again.metadata.message_id == message.metadata.message_id != ""
    assert again.content["config"]["x"] == 1
