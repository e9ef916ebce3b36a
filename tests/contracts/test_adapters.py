"""Every adapter x every property: what federable.py says of it is true, it runs, and stock PEFT reads what it leaves behind."""

import json
import warnings

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError, simulate
from fedpeft.adapters import frozen
from fedpeft.adapters.federable import FEDERABLE, How
from fedpeft.adapters.others import other
from fedpeft.lookup import TABLES
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate

TARGETS = ["query", "value"]
SETTINGS = {
    "lora": {"r": 4},
    "lora_fa": {"r": 4},
    "fora": {"r": 4},
    "dora": {"r": 4},
    "bd_lora": {"r": 4},
    "miss": {"r": 4},
    "vera": {"r": 8},
    "randlora": {"r": 4},
    "fourierft": {"n_frequency": 50},
    "shira": {"r": 2},
}
OPTIONS = {
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 8},
    "ia3": {"feedforward_modules": []},
    "oft": {"oft_block_size": 8},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "road": {"group_size": 8},
    "vblora": {"r": 4, "vector_length": 8, "num_vectors": 16},
    "waveft": {"n_frequency": 50},
}
VARIANTS = {
    "rslora": {"name": "lora", "r": 4, "use_rslora": True},
    "pissa": {"name": "lora", "r": 4, "init": "pissa"},
    "olora": {"name": "lora", "r": 4, "init": "olora"},
    "lora_ga": {"name": "lora", "r": 4, "init": "lora_ga"},
    "lora_fa from pissa": {"name": "lora_fa", "r": 4, "init": "pissa"},
    "miss bat": {"name": "miss", "r": 4, "init_weights": "bat"},
    "miss mini": {"name": "miss", "r": 4, "init_weights": "mini", "mini_r": 4},
    "shira columns": {"name": "shira", "r": 2, "mask": "columns"},
    "fora, all layers": {"name": "fora", "r": 4, "layers": 1.0},
    "fora, not orthonormal": {"name": "fora", "r": 4, "orthonormal": False},
}
WORKING = [name for name, facts in FEDERABLE.items() if facts.how is not How.REFUSED]
REFUSED = [name for name, facts in FEDERABLE.items() if facts.how is How.REFUSED]


def section(name):
    if name in VARIANTS:
        return {"target_modules": TARGETS, **VARIANTS[name]}
    own = SETTINGS.get(name, {}) if name in TABLES["adapter"] else {"options": OPTIONS.get(name, {})}
    return {"name": name, "target_modules": TARGETS, **own}


@pytest.fixture
def assembled(tiny_settings):
    def make(name, **others):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return assemble(Config.from_dict({**tiny_settings, "adapter": section(name), **others}))

    return make


def affine(adapted):
    """What every adapted layer computes besides its base: module -> [inputs + 1, outputs], the last row for the input zero."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    adapted.model.eval()
    for name, layer in adapted.model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not name.endswith("base_layer"):
            base = layer.get_base_layer()
            x = torch.cat([torch.eye(base.weight.shape[-1]), torch.zeros(1, base.weight.shape[-1])])
            with torch.no_grad():
                full = (layer(x).double() - base(x).double()).numpy()
            found[name] = np.concatenate([full[:-1] - full[-1], full[-1:]])
    return found


def drawn(adapted, seed, start):
    """Random values of what trains outside the head."""
    generator = np.random.default_rng(seed)
    names = [name for name in adapted.trained if name not in adapted.head and name not in adapted.adapter.resting(adapted.layout(), start)]
    return {name: (start[name] + 0.3 * generator.normal(size=start[name].shape)).astype(np.float32) for name in names}


def averaging_error(adapted):
    start = {**adapted.read(), **adapted.merges}
    clients, updates = [], []
    for seed in (0, 1):
        clients.append(drawn(adapted, seed, start))
        adapted.write({**start, **clients[-1]})
        updates.append(affine(adapted))
    adapted.write({**start, **{name: (clients[0][name] + clients[1][name]) / 2 for name in clients[0]}})
    got = affine(adapted)
    ideal = {module: (updates[0][module] + updates[1][module]) / 2 for module in got}
    return np.sqrt(sum(((got[m] - ideal[m]) ** 2).sum() for m in got) / sum((ideal[m] ** 2).sum() for m in got))


# --- the table ---------------------------------------------------------------------------------------------------------


def test_every_type_of_the_installed_peft_has_a_row():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert {facts.peft for facts in FEDERABLE.values()} == {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(TABLES["adapter"]) <= set(FEDERABLE)


@pytest.mark.parametrize("name", WORKING)
def test_averaging_is_as_exact_as_the_table_says(name, assembled):
    error, facts = averaging_error(assembled(name).adapted), FEDERABLE[name]
    if facts.how is How.EXACT:
        assert error < 2e-6
        assert facts.error == 0
    else:
        assert error == pytest.approx(facts.error, rel=0.05)
        assert error > 1e-2


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_cannot_be_federated_is_refused_with_what_works(name):
    with pytest.raises(UserError, match="cannot be federated: .*use adapter"):
        Config.from_dict({"adapter": {"name": name}})


# --- the whole way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WORKING, *VARIANTS])
def test_a_run_learns_something_and_stock_peft_reloads_it(name, tiny_settings, tiny_bert, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = Config.from_dict({**tiny_settings, "adapter": section(name), "strategy": {"num_rounds": 2}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = simulate(config, tmp_path / "run")
    assert run.summary["rejected_updates"] == 0
    assert run.summary["first_trained_layer"] in (0, 1)
    parts = assemble(config)
    adapted = parts.adapted
    start = adapted.read()
    moved = [name for name in adapted.trained if name not in adapted.head and np.abs(run.arrays[name] - start[name]).max() > 0]
    assert moved
    adapted.write(run.arrays)
    ours = evaluate.logits(adapted, parts.test, 7)
    torch.manual_seed(999)
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3), run.adapter_dir).eval()
    adapted.model = model
    np.testing.assert_allclose(ours, evaluate.logits(adapted, parts.test, 7), atol=1e-5 * max(1.0, float(np.abs(ours).max())))
