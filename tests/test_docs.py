"""What README.md tells a person to type works as it stands."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from fedpeft import Config
from fedpeft.arguments import parser
from fedpeft.cli import COMMANDS
from fedpeft.lookup import TABLES

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_walk_through_runs_from_the_first_line_to_the_last(tmp_path):
    """The shell block with the CSV file, that of the export, then both Python blocks, in one folder."""
    shell = "".join(block for block in blocks("sh") if "cat > reviews.csv" in block or "fedpeft export" in block)
    bin_folder = pathlib.Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euc", f"PATH={shlex.quote(str(bin_folder))}:$PATH\n{shell}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reviews-split" / "partition.png").is_file()
    assert (tmp_path / "reviews-model" / "model.safetensors").is_file()
    for program in blocks("python"):
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "reviews-run-2" / "adapter" / "adapter_config.json").is_file()


def comparison():
    (block,) = [block for block in blocks("sh") if "mine.csv" in block]
    return [line for line in block.splitlines() if line]


def test_a_comparison_on_one_s_own_file_is_under_ten_commands():
    assert comparison()[0].startswith("git clone")
    assert len(comparison()) < 10
    assert [line.split()[1] for line in comparison() if line.startswith("fedpeft ")] == ["partition", "simulate", "study"]


@pytest.mark.slow
def test_the_commands_of_the_comparison_run_as_they_stand(tmp_path):
    """Those after the install, on a file of twenty rows, shortened to one seed and one round."""
    commands = comparison()
    rows = [f"{number} is {'a good' if number % 2 else 'no good'} film,{'ab'[number % 2]},{'xy'[number // 2 % 2]}" for number in range(20)]
    (tmp_path / "mine.csv").write_text("body,topic,site\n" + "\n".join(rows) + "\n")
    short = "strategy.num_rounds=1 training.max_steps=1 data.test_fraction=0.3"
    shell = "\n".join(commands[commands.index("source .venv/bin/activate") + 1 :])
    shell = shell.replace(" data.columns.client", f" {short} data.columns.client").replace("--seeds 3", "--seeds 1")
    path = f"PATH={shlex.quote(str(pathlib.Path(sys.executable).parent))}:$PATH"
    done = subprocess.run(["bash", "-euc", f"{path}\n{shell}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in ("fedavg", "ffa_lora", "lora_fair", "fedsmooth_lora"))
    assert (tmp_path / "compared" / "study.png").is_file()


def real_clients():
    (shell,) = [block for block in blocks("sh") if "fedpeft keys" in block]
    return shell


def test_the_commands_of_real_clients_are_understood():
    lines = [line.removesuffix(" &") for line in real_clients().splitlines() if line.startswith("fedpeft ")]
    given = [parser(COMMANDS).parse_args(shlex.split(line)[1:]) for line in lines]
    assert [one.command.__name__ for one in given] == ["keys", "server", "client", "client", "client"]


@pytest.mark.slow
def test_the_commands_of_real_clients_run_as_they_stand(tmp_path):
    """With a port that is free, and each process's own exit code asked for."""
    from fedpeft.addresses import free_port

    (data,) = [block for block in blocks("sh") if "cat > reviews.csv" in block]
    files = data[: data.index("fedpeft partition")]
    port = free_port()
    shell = real_clients().replace(":9092", f":{port}").replace("\nwait\n", "\nfor job in $(jobs -p); do wait $job; done\n")
    assert "for job" in shell
    path = f"PATH={shlex.quote(str(pathlib.Path(sys.executable).parent))}:$PATH"
    done = subprocess.run(["bash", "-euc", f"{path}\n{files}\n{shell}"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reviews-real" / "adapter" / "adapter_config.json").is_file()


def test_every_command_of_the_readme_is_one():
    said = re.findall(r"`fedpeft ([a-z]+)", README)
    assert set(said) <= set(COMMANDS)
    assert set(COMMANDS) - {"doctor"} <= set(said) | {"simulate"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parser(COMMANDS).parse_args([name, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_overrides_of_the_readme_are_keys():
    for override in re.findall(r"(?<![\w.])((?:[a-z_]+\.)+[a-z_]+=[\w.+-]+)", README):
        Config.load(None, [override])


def test_every_dependency_has_its_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = README[README.index("## Dependencies") :]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.match(r"[A-Za-z0-9-]+", requirement).group().lower()
        assert name.removeprefix("types-") in reasons.lower(), name


def test_partitioners_of_the_readme_are_those_there_are():
    for name in TABLES["partitioner"]:
        assert f"`{name}`" in README


def test_strategies_of_the_readme_are_those_there_are():
    for name in TABLES["strategy"]:
        assert f"`{name}`" in README


def test_the_ranks_of_the_readme_are_configs():
    (block,) = [block for block in blocks("yaml") if "lora, r:" in block]
    for line in block.splitlines():
        assert Config.from_dict({**yaml.safe_load(line), "strategy": {"name": "flora"}}).adapter.build().mixed_ranks


def test_the_privacy_of_the_readme_is_a_config():
    (block,) = [block for block in blocks("yaml") if "target_epsilon" in block]
    assert Config.from_dict(yaml.safe_load(block)).privacy.target_epsilon == 3


def test_the_example_of_the_contributing_guide_is_a_strategy(tmp_path, tiny_settings):
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    imports = (
        "from pydantic import Field\nfrom fedpeft.strategies import aggregation\n"
        "from fedpeft.strategies.strategy import Combined, Strategy\n"
    )
    (tmp_path / "my_file.py").write_text(imports + code)
    from fedpeft import simulate

    strategy = {"name": f"{tmp_path / 'my_file.py'}:Halfway", "share": 0.3, "num_rounds": 1}
    run = simulate(Config.from_dict({**tiny_settings, "strategy": strategy}), tmp_path / "run")
    assert run.summary["rounds_completed"] == 1
