"""The config: defaults, overrides, and one clear line for every kind of mistake, all at once."""

import pathlib

import pytest
import yaml

from fedpeft import Config, UserError

ROOT = pathlib.Path(__file__).parent.parent.parent


def complaints(overrides=(), path=None):
    with pytest.raises(UserError) as caught:
        Config.load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_quickstart_yaml_says_the_embedded_default_aloud():
    spoken = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    assert Config.load(ROOT / "configs" / "quickstart.yaml").as_dict() == Config.load().as_dict() == spoken


def test_a_resolved_config_repeats_itself(tmp_path):
    config = Config.load(None, ["partition.name=dirichlet", "partition.clients=7", "adapter.target_modules=[query]"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    again = Config.load(tmp_path / "again.yaml")
    assert again.as_dict() == config.as_dict()
    assert again.adapter.settings == config.adapter.settings


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("strategy: {num_rounds: 4}\nseed: 3\n")
    config = Config.load(tmp_path / "c.yaml", ["strategy.num_rounds=9"])
    assert (config.strategy.num_rounds, config.seed) == (9, 3)


def test_a_number_written_without_a_dot_is_a_number():
    assert Config.load(None, ["training.learning_rate=5e-4"]).training.learning_rate == 5e-4


def test_an_unknown_key_names_its_neighbour_and_its_line(tmp_path):
    (tmp_path / "c.yaml").write_text("name: x\nstrategy:\n  name: fedavg\n  num_round: 4\n")
    (line,) = complaints(path=tmp_path / "c.yaml")
    assert line.startswith("strategy.num_round (")
    assert "line 4" in line
    assert 'did you mean "num_rounds"?' in line


def test_an_unknown_section_names_its_neighbour():
    (line,) = complaints(["trainning.max_steps=3"])
    assert 'did you mean "training"?' in line


def test_a_key_of_another_partitioner_is_unknown():
    (line,) = complaints(["partition.name=iid", "partition.alpha=0.3"])
    assert line.startswith("partition.alpha (command line): unknown key; allowed: name, clients, min_examples")


def test_a_misspelt_strategy_names_the_nearest():
    (line,) = complaints(["strategy.name=fedavgg"])
    assert 'no strategy is called "fedavgg"' in line
    assert 'did you mean "fedavg"?' in line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.max_steps=0", "greater than or equal to 1"),
        ("strategy.fraction_train=1.5", "less than or equal to 1"),
        ("model.dtype=float8", "'float32', 'bfloat16' or 'float16'"),
        ("adapter.r=many", "valid integer"),
        ("training.num_train_epochs=1", "either max_steps or num_train_epochs"),
        ("training.optimizer=adam", 'no optimizer is called "adam"'),
        ("partition.name=mine.py:deal", "there is no file"),
        ("partition.name=no_such_package:deal", "No module named"),
        ("privacy.unit=example", "give target_epsilon"),
        ("nonsense", "is no override"),
        ("seed.x=1", ""),
        ("name=a/b", "match pattern"),
    ],
)
def test_every_mistake_is_one_line(override, says):
    lines = complaints([override])
    assert len(lines) == 1
    assert says in lines[0]


def test_all_problems_are_said_at_once():
    lines = complaints(["strategy.name=fedavgg", "training.lr=3", "adapter.r=0", "partition.clients=0", "modell.name=x"])
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1,", "is not valid YAML"),
        ("- 1\n", "holds no mapping"),
        ("strategy: {num_rounds: 1}\nstrategy: {num_rounds: 2}\n", '"strategy" stands twice (first in line 1)'),
        ("strategy: 3\n", "strategy"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    (line,) = complaints(path=tmp_path / "c.yaml")
    assert says in line


def test_a_missing_file_is_one_line(tmp_path):
    (line,) = complaints(path=tmp_path / "gone.yaml")
    assert "cannot be read" in line


def test_ones_own_function_brings_its_own_keys(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "import numpy as np\n"
        "def halves(examples, clients, generator, *, share: float = 0.5):\n"
        "    '''Two parts.'''\n"
        "    return np.split(np.arange(len(examples)), [int(share * len(examples))])\n"
    )
    config = Config.load(None, [f"partition.name={own}:halves", "partition.share=0.25"])
    first, second = config.partition.build(range(8), 2, None)
    assert (len(first), len(second)) == (2, 6)
    (line,) = complaints([f"partition.name={own}:halves", "partition.shore=0.25"])
    assert 'did you mean "share"?' in line


def test_every_key_says_what_it_is():
    from fedpeft.listing import describe

    assert all(line.split(": ", 1)[1].strip() not in {"", "None"} for line in describe("config"))


def test_a_key_below_an_explicit_null_can_be_set(tmp_path):
    (tmp_path / "config.yaml").write_text(Config.load().to_yaml())
    settings = ["privacy.target_epsilon=3", "training.head_init=random"]
    assert Config.load(tmp_path / "config.yaml", settings).privacy.target_epsilon == 3
