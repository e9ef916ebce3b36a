"""Imports run downwards only; what a person waits for loads nothing heavy."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "fedpeft"

LAYERS = [
    {
        "errors",
        "records",
        "arrays",
        "seeds",
        "lookup",
        "units",
        "environment",
        "collector",
        "frozen_linear",
        "yaml_file",
        "quiet",
        "products",
        "intervals",
        "keys",
        "durable",
        "health",
        "addresses",
    },
    {
        "config",
        "sections",
        "complaints",
        "flower_private",
        "flower_fleet",
        "flower_link",
        "wire",
        "screen",
        "runs",
        "curves",
        "page",
        "report",
        "strategies",
        "data",
        "privacy",
    },
    {"base", "adapters", "tasks", "training"},
    {"client", "server"},
    {"simulations", "listing"},
    {"cli", "arguments", "__main__", "__init__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FLOWER = {
    "flower_strategy.py",
    "flower_private.py",
    "flower_fleet.py",
    "flower_link.py",
    "wire.py",
    "exchange.py",
    "rounds.py",
    "grid.py",
    "ray_grid.py",
    "roster.py",
    "resident.py",
    "participation.py",
    "flower_app.py",
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "fedpeft":
                yield from (f"fedpeft.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "fedpeft" and len(parts) > 1 and room(path) != "__init__":
            assert parts[1] in LEVEL, f"{path.name} imports {name}, which no layer lists"
            assert LEVEL[parts[1]] <= LEVEL[room(path)], f"{path.name} imports {name} from a higher layer"


def test_client_and_server_do_not_know_each_other():
    for path in modules():
        other = {"client": "fedpeft.server", "server": "fedpeft.client"}.get(room(path))
        assert not any(other and name.startswith(other) for name in imported(path)), path


def test_every_module_is_in_a_layer():
    assert {room(path) for path in modules()} == set(LEVEL)


def test_flower_is_imported_in_few_files():
    users = {path.name for path in modules() if any(name.split(".")[0] == "flwr" for name in imported(path))}
    assert users == FLOWER


@pytest.mark.parametrize(
    "command",
    [
        "import fedpeft",
        "from fedpeft.cli import COMMANDS, parser; parser(COMMANDS).format_help()",
        "from fedpeft import Config; Config.load()",
    ],
)
def test_no_heavy_import_before_work(command):
    heavy = {"torch", "flwr", "transformers", "peft", "datasets", "matplotlib"}
    code = f"{command}\nimport sys; print(','.join(sorted({heavy} & set(sys.modules))))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_help_answers_quickly_because_it_loads_little():
    code = "import fedpeft.cli, sys; print(len(sys.modules))"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) < 200
