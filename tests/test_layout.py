"""The house: doors, sizes, headers, names."""

import ast
import pathlib
import sys

import pytest

from fedpeft.lookup import TABLES, find, first_line

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "fedpeft"
MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("door", ["server", "client", "strategies", "simulations"])
def test_doors_at_the_root_lead_to_the_rooms(door):
    assert (ROOT / door).is_symlink()
    assert (ROOT / door).resolve() == (PACKAGE / door).resolve()


@pytest.mark.parametrize("path", [path for path in MODULES if path.stat().st_size], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_one_idea_with_a_header(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 320
    assert ast.get_docstring(ast.parse(text)), f"{path} says nothing of itself"


def test_no_module_shadows_the_standard_library():
    assert not {path.stem for path in MODULES} & (set(sys.stdlib_module_names) - {"__init__", "__main__"})


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in TABLES.items() for name in table])
def test_every_row_of_a_table_leads_somewhere_and_says_what_it_is(kind, name):
    assert first_line(find(kind, name))


def test_every_strategy_cites_its_paper():
    for name in TABLES["strategy"]:
        module = sys.modules[find("strategy", name).__module__]
        assert "arXiv" in (module.__doc__ or ""), name


def test_every_file_of_a_strategy_or_partitioner_is_in_its_table():
    for kind, folder, others in (
        ("strategy", PACKAGE / "strategies", {"__init__", "strategy", "aggregation", "facts", "fitting", "over", "flower_strategy"}),
        ("partitioner", PACKAGE / "data" / "partitions", {"__init__", "picture"}),
    ):
        rows = {row.partition(":")[0].rpartition(".")[2] for row in TABLES[kind].values()}
        assert {path.stem for path in folder.glob("*.py")} - others == rows


def test_nothing_is_random_through_a_global():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            assert name not in {"np.random.seed", "np.random.rand", "np.random.choice", "random.random", "random.sample", "random.seed"}, (
                path
            )


def test_the_checks_see_every_file_once():
    """The doors share their names with the rooms: what leaves one out must not leave out the other."""
    import subprocess

    shown = subprocess.run([sys.executable, "-m", "ruff", "check", "--show-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    seen = {pathlib.Path(line) for line in shown.stdout.splitlines()}
    assert set(MODULES) <= seen
    assert not {path for path in seen if path.relative_to(ROOT).parts[0] in {"server", "client", "strategies", "simulations"}}
