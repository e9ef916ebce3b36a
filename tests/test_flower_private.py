"""What fedpeft uses of Flower beyond its public API stands in three files, and does what they say."""

import ast
import pathlib

import flwr
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedpeft import environment, flower_private, wire

PACKAGE = pathlib.Path(__file__).parent.parent / "fedpeft"
PRIVATE = {"flower_private.py", "flower_fleet.py", "flower_link.py"}
PUBLIC = {"flwr.app", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.clientapp"}


def flower_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "flwr")


def test_private_names_of_flower_stand_in_three_files():
    users = {path.name for path in PACKAGE.rglob("*.py") if set(flower_modules(path)) - PUBLIC}
    assert users == PRIVATE


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_every_private_name_is_there(name):
    """Each import inside the functions of those files, made: another Flower fails here first."""
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
            module = __import__(node.module, fromlist=["x"])
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_tested_series_is_the_installed_one():
    assert flwr.__version__.startswith("1.39.")


def test_nothing_calls_home():
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
        assert name in environment.DEFAULTS


def test_there_is_one_poll_interval():
    """Both sides look for messages as often as wire.py says; nobody else sleeps on a number of its own while a run goes on."""
    assert wire.POLL_SECONDS == 0.2
    users = {path.name for path in PACKAGE.rglob("*.py") if "POLL_SECONDS" in path.read_text()}
    assert users == {"wire.py", "exchange.py", "rounds.py", "deployment.py", "participation.py", "flower_app.py", "ray_grid.py"}


def test_a_message_survives_its_bytes():
    flower_private.take_identity(1)
    content = RecordDict(
        {"arrays": ArrayRecord({"flat": Array("uint8", (3,), wire.STYPE, b"abc")}), "manifest": ConfigRecord({"json": "{}"})}
    )
    message = flower_private.stamp(Message(content, 7, "train"))
    again = flower_private.from_bytes(flower_private.to_bytes(message))
    assert again.metadata.message_id == message.metadata.message_id
    assert again.content["arrays"]["flat"].data == b"abc"
    assert again.object_id == message.object_id
