"""Every task x engine x privacy, and every strategy and adapter on words and pictures (texts have tests of their own).

What must hold whatever the task: a record's loss does not depend on its batch mates, its gradient in closed form is that of the
record alone, both engines train alike, and a run under privacy is the same from either. Models have a few thousand numbers.
"""

import json
import warnings

import numpy as np
import pytest
import torch

from fedpeft import Config
from fedpeft.lookup import TABLES, find
from fedpeft.screen import Plain
from fedpeft.server import rounds
from fedpeft.server.run_folder import RunFolder
from fedpeft.simulations import run as simulation
from fedpeft.simulations.assemble import assemble
from fedpeft.training import many, one, private
from fedpeft.training.evaluate import of_every_record
from fedpeft.training.job import Job
from tests.contracts.test_adapters import SETTINGS


@pytest.fixture
def tasks(tiny_settings, tiny_lm_settings, tiny_picture_settings, tmp_path):
    """A config a task, each with four clients and a linear schedule of plain steps."""
    rows = [{"text": f"a {n}", "text_pair": f"b {n % 7}", "label": ["x", "y"][: n % 3]} for n in range(60)]
    (tmp_path / "sets.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"name": str(tmp_path / "sets.jsonl"), "columns": {"text_pair": "text_pair"}, "max_length": 16}
    sets = {**tiny_settings, "model": {**tiny_settings["model"], "multi_label": True}, "data": data}
    found = {"texts": tiny_settings, "pairs with sets": sets, "words": tiny_lm_settings, "pictures": tiny_picture_settings}
    shared = {"partition": {"name": "iid", "clients": 5}, "strategy": {"num_rounds": 2}}
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "head_init": "random"}
    return {name: {**settings, **shared, "training": training} for name, settings in found.items()}


TASKS = ("texts", "pairs with sets", "words", "pictures")
OTHERS = ("words", "pictures")


def play(settings, folder):
    """A run without its pictures and reports: what came of it, and its parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = Config.from_dict(settings)
        parts = assemble(config)
        folder.mkdir()
        grid = find("simulation", config.simulation.engine)(parts.worker)
        outcome = rounds.run(simulation._federation(config, parts, lambda: grid.roster), grid, RunFolder(folder), Plain())
    assert outcome.stopped_because == "finished"
    assert not any(record.rejected for record in outcome.records)
    assert all(record.update_norm > 0 for record in outcome.records[1:])
    assert all(np.isfinite(value) for record in outcome.records for value in record.metrics.values())
    return outcome, parts


@pytest.mark.parametrize("task", TASKS)
def test_a_record_does_not_know_its_batch_mates(task, tasks):
    """Losses and outputs of a batch are those of its records alone."""
    parts = assemble(Config.from_dict(tasks[task]))
    mine, base = parts.worker.nodes[0].train, parts.adapted.base
    parts.adapted.model.eval()
    with torch.no_grad():
        together = parts.task.losses(parts.adapted.model, *mine.batch(np.arange(6), base.tokenizer, "cpu"))
        alone = [parts.task.losses(parts.adapted.model, *mine.batch(np.array([row]), base.tokenizer, "cpu")) for row in range(6)]
    assert together.shape == (6,)
    assert len({round(float(loss), 4) for loss in together}) > 1
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    ask = parts.task.outputs
    np.testing.assert_allclose(of_every_record(parts.adapted, mine, 7, ask), of_every_record(parts.adapted, mine, 1, ask), atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_a_record_s_gradient_in_closed_form_is_that_of_the_record_alone(task, tasks):
    parts = assemble(Config.from_dict(tasks[task]))
    adapted, data = parts.adapted, parts.worker.nodes[0].train
    start = {
        name: array + 0.01 * np.random.default_rng(1).standard_normal(array.shape).astype(np.float32)
        for name, array in adapted.read().items()
    }
    adapted.write(start)
    trained = dict(zip(adapted.trained, adapted.train_only(adapted.trained), strict=True))
    job = Job(0, 1, start, adapted.trained, data)
    adapted.model.eval()
    assert not private.uncovered(adapted.model, trained)
    rows = private.rows(adapted, parts.task, job, np.arange(5), trained)
    for row in range(5):
        adapted.model.zero_grad()
        parts.task.losses(adapted.model, *data.batch(np.array([row]), adapted.base.tokenizer, "cpu")).sum().backward()
        for name, parameter in trained.items():
            np.testing.assert_allclose(rows[name][row], parameter.grad, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("task", TASKS)
def test_engines_agree(task, tasks):
    training = {**tasks[task]["training"], "optimizer": "sgd", "learning_rate": 0.1}
    parts = assemble(config := Config.from_dict({**tasks[task], "training": training}))
    jobs = [Job(client, 1, parts.adapted.read(), parts.adapted.trained, node.train) for client, node in parts.worker.nodes.items()]
    for left, right in zip(*(engine.train(parts.adapted, parts.task, config, jobs) for engine in (one, many)), strict=True):
        assert not right.fell_back
        assert left.loss == pytest.approx(right.loss, abs=1e-5)
        for name in left.arrays:
            np.testing.assert_allclose(left.arrays[name], right.arrays[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("task", TASKS)
def test_a_private_run_is_the_same_from_either_engine(task, tasks, tmp_path):
    ended = []
    for engine in ("one", "many"):
        training = {**tasks[task]["training"], "engine": engine}
        settings = {**tasks[task], "training": training, "privacy": {"noise_multiplier": 1.0, "insecure_seed": 4}}
        ended.append(play(settings, tmp_path / engine)[0])
    left, right = ended
    assert left.records[-1].epsilon == right.records[-1].epsilon > 0
    assert left.records[-1].loss is None
    for name in left.arrays:
        np.testing.assert_allclose(left.arrays[name], right.arrays[name], atol=1e-5, err_msg=name)


OWN = {"slora": {"warmup_rounds": 1}}
ADAPTERS = {"fed_sb": {"name": "lora_sb", "r": 4}}


@pytest.mark.parametrize("name", [name for name in TABLES["strategy"]])
@pytest.mark.parametrize("task", OTHERS)
def test_every_strategy_runs(task, name, tasks, tmp_path):
    """Engines take turns over the strategies, other ones on words than on pictures."""
    engine = ("one", "many")[(sorted(TABLES["strategy"]).index(name) + OTHERS.index(task)) % 2]
    own = {"of": "factors"} if "of" in find("strategy", name).model_fields else OWN.get(name, {})
    training = {**tasks[task]["training"], "engine": engine, "optimizer": "sgd" if name == "scaffold" else "adamw"}
    adapter = {**ADAPTERS.get(name, {"name": "lora", "r": 4}), "target_modules": ["q_proj", "v_proj"]}
    settings = {**tasks[task], "strategy": {"name": name, "num_rounds": 2, **own}, "training": training, "adapter": adapter}
    play(settings, tmp_path / "run")


@pytest.mark.parametrize("name", [name for name in TABLES["adapter"] if name != "lora"])
@pytest.mark.parametrize("task", OTHERS)
def test_every_adapter_runs(task, name, tasks, tmp_path):
    strategy = "fed_sb" if name == "lora_sb" else "fedavg"
    adapter = {"name": name, "target_modules": ["q_proj", "v_proj"], **SETTINGS.get(name, {"r": 4} if name == "lora_sb" else {})}
    training = {**tasks[task]["training"], "engine": "many"}
    play({**tasks[task], "adapter": adapter, "training": training, "strategy": {"name": strategy, "num_rounds": 1}}, tmp_path / "run")
