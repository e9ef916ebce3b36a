"""Every adapter x every property: what federable.py says of it is true, it runs, and stock PEFT reads what it leaves behind."""

import json
import warnings

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError, simulate
from fedpeft.adapters import frozen
from fedpeft.adapters.federable import FEDERABLE, How
from fedpeft.adapters.ln_tuning import NORMS
from fedpeft.lookup import TABLES
from fedpeft.server import ending
from fedpeft.server.export import export
from fedpeft.simulations import run as simulation
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
    "vblora": {"r": 4, "vector_length": 8, "num_vectors": 16},
    "c3a": {"block_size": 8},
    "ln_tuning": {"target_modules": NORMS},
}
OPTIONS = {
    "boft": {"boft_block_size": 8},
    "ia3": {"feedforward_modules": []},
    "oft": {"oft_block_size": 8},
    "psoft": {"r": 4},
    "pvera": {"r": 8},
    "road": {"group_size": 8},
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
        assert error < 1e-6
        assert facts.error == 0
    else:
        assert error == pytest.approx(facts.error, rel=0.05)
        assert error > 1e-2


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_cannot_be_federated_is_refused_with_what_works(name):
    with pytest.raises(UserError, match=r"cannot be federated: .*use adapter"):
        Config.from_dict({"adapter": {"name": name}})


# --- the whole way -------------------------------------------------------------------------------------------------------


def draw_nothing(monkeypatch):
    """Pictures are tested elsewhere, and take longer than the run."""
    for place, picture in ((ending, "curves"), (ending, "write_report"), (simulation, "draw")):
        monkeypatch.setattr(place, picture, lambda *arguments: None)


@pytest.mark.parametrize("name", [*WORKING, *VARIANTS])
def test_a_run_learns_something_and_stock_peft_reloads_and_merges_it(name, tiny_settings, tiny_bert, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    draw_nothing(monkeypatch)
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
    close = 1e-5 * max(1.0, float(np.abs(ours).max()))
    np.testing.assert_allclose(ours, evaluate.logits(adapted, parts.test, 7), atol=close)
    export(tmp_path / "run", tmp_path / "whole", None, merge=True, dtype="float32")
    adapted.model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    np.testing.assert_allclose(ours, evaluate.logits(adapted, parts.test, 7), atol=close)


# --- frozen bases --------------------------------------------------------------------------------------------------------


SEEDED = {
    "frod": {"sparse_rate": 0.02},
    "vera": {"projection_prng_key": 1},
    "randlora": {"projection_prng_key": 1},
    "unilora": {"proj_seed": 1},
    "fourierft": {"random_loc_seed": 1},
    "shira": {"random_seed": 1},
}


@pytest.mark.parametrize("name", WORKING)
def test_frozen_bases_are_in_the_fingerprint_and_follow_from_the_config(name, assembled):
    first, second = (assembled(name).adapted.base.fingerprint for _ in range(2))
    assert first == second
    plain = assembled("lora").adapted.base.fingerprint
    in_tensors = {
        "nothing",
        FEDERABLE["lora_fa"].shared,
        FEDERABLE["fora"].shared,
        FEDERABLE["lora_sb"].shared,
    }  # these are checked by other digests
    assert (first == plain) == (FEDERABLE[name].shared in in_tensors)


@pytest.mark.parametrize("name", SEEDED)
def test_a_client_with_other_bases_is_left_out_with_that_reason(name, tiny_settings, tmp_path):
    from fedpeft.screen import choose
    from fedpeft.server import rounds
    from fedpeft.server.run_folder import RunFolder
    from fedpeft.simulations.grid import LocalGrid
    from fedpeft.simulations.run import _federation

    config = Config.from_dict({**tiny_settings, "adapter": section(name), "strategy": {"num_rounds": 1}})
    other = Config.from_dict({**tiny_settings, "adapter": {**section(name), **SEEDED[name]}, "strategy": {"num_rounds": 1}})
    with warnings.catch_warnings(), choose(json=True) as screen:
        warnings.simplefilter("ignore")
        parts, strange = assemble(config), assemble(other)
        grid = LocalGrid(strange.worker)
        (folder := RunFolder(tmp_path / "run")).create(config)
        outcome = rounds.run(_federation(config, parts, lambda: grid.roster), grid, folder, screen)
    reasons = set(outcome.records[-1].rejected_clients.values())
    assert len(outcome.records[-1].rejected_clients) == 4
    if name != "frod":  # FRoD's sparse values differ in number: these are other tensors
        assert all("other frozen bases of the adapter" in reason for reason in reasons)


def test_an_eigenvector_of_the_other_sign_is_noticed(assembled):
    """FRoD's basis is free in sign: two libraries may differ by that alone, and then S means another update."""
    adapted = assembled("frod").adapted
    before = frozen.digest(adapted.model, tuple(adapted.parameters.values()))
    (basis,) = (
        v for name, v in adapted.model.named_buffers() if "frod_V.self_query" in name and name.count("frod_V") == 1 and "layer" not in name
    )
    basis[:, 5] *= -1
    assert frozen.digest(adapted.model, tuple(adapted.parameters.values())) != before


# --- bad input -----------------------------------------------------------------------------------------------------------


BAD = {
    "matches nothing": ({"name": "lora", "target_modules": ["qurey"]}, "target_modules among"),
    "r beyond the dimension": ({"name": "lora", "r": 33, "target_modules": ["query"]}, "33 is more than the 32 rows or columns"),
    "r beyond the dimension, miss": (
        {"name": "miss", "r": 64, "target_modules": ["query"]},
        "64. must be less than or equal to in_features .32",
    ),
    "fora without layers": ({"name": "fora", "target_modules": ["pooler.dense"]}, "no layers to choose from"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_weights_are_loaded(case, tiny_settings, monkeypatch):
    from fedpeft import base

    monkeypatch.setattr(base, "load", lambda *arguments: pytest.fail("the weights were loaded"))
    adapter, says = BAD[case]
    with pytest.raises(UserError, match=says):
        assemble(Config.from_dict({**tiny_settings, "adapter": adapter}))


def test_more_directions_than_a_gradient_has_are_refused(tiny_settings):
    adapter = {"name": "lora", "init": "lora_ga", "r": 17, "target_modules": ["query"]}
    with pytest.raises(UserError, match="at most 16"):
        assemble(Config.from_dict({**tiny_settings, "adapter": adapter}))


def test_targets_that_match_the_head_by_accident_are_refused(tiny_settings, tiny_bert, tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), **small)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {
        **tiny_settings,
        "model": {"name": str(tmp_path / "base")},
        "adapter": {"name": "lora", "r": 4, "target_modules": ["dense"]},
    }
    with pytest.raises(UserError, match=r"dense also matches classifier.dense in the head"):
        assemble(Config.from_dict(settings))
    settings["adapter"]["target_modules"] = r"roberta[.].*[.]dense"
    assert assemble(Config.from_dict(settings)).adapted.layout().pairs


def test_decompositions_of_quantised_weights_are_refused(tiny_settings, tiny_bert, tmp_path):
    import shutil

    shutil.copytree(tiny_bert, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    )
    for adapter in ({"name": "frod"}, {"name": "lora", "init": "pissa"}):
        with pytest.raises(UserError, match="these are quantised; use adapter lora"):
            assemble(Config.from_dict({**tiny_settings, "model": {"name": str(tmp_path / "base")}, "adapter": adapter}))


COMBINED = {
    "factors that are not all": ({"name": "dora"}, "flora", "has none or more than these"),
    "a frozen A that is turned": ({"name": "lora_fa"}, "fed_svd", "keeps A as it was drawn; use strategy fedavg"),
    "a frozen A that is turned, underneath": ({"name": "lora_fa"}, {"name": "fedprox", "over": "ro_lora"}, "keeps A as it was drawn"),
    "a frozen A that is asked for": ({"name": "lora_fa"}, "lora_fair", "keeps A as it was drawn"),
    "a start that is lost": ({"name": "lora", "init": "pissa"}, "fedsmooth_lora", "init pissa is lost"),
    "a start for one rank": ({"name": "lora", "init": "olora", "r": [2, 4]}, "flex_lora", "needs one rank for all clients"),
    "no such start": ({"name": "lora", "init": "pisa"}, "fedavg", 'did you mean "pissa"?'),
    "no such adapter": ({"name": "lorra"}, "fedavg", 'did you mean "lora"?'),
}


@pytest.mark.parametrize("case", COMBINED)
def test_combinations_that_mean_nothing_are_refused_when_the_config_is_read(case):
    adapter, strategy, says = COMBINED[case]
    with pytest.raises(UserError) as caught:
        Config.from_dict({"adapter": adapter, "strategy": {"name": strategy} if isinstance(strategy, str) else strategy})
    assert says in str(caught.value)


# --- planted errors ------------------------------------------------------------------------------------------------------


def test_the_check_of_exactness_sees_a_method_that_is_not(assembled):
    """RoAd was once taken for exact: its rotation is scaled linearly, and its angle is not."""
    assert averaging_error(assembled("road").adapted) > 1e-2


def test_the_fold_of_the_gate_is_needed(tiny_settings, tiny_bert, tmp_path, monkeypatch):
    from fedpeft.adapters.adapter import Adapter
    from fedpeft.adapters.fora import Fora

    monkeypatch.setattr(Fora, "export", Adapter.export)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        test_a_run_learns_something_and_stock_peft_reloads_and_merges_it("fora", tiny_settings, tiny_bert, tmp_path, monkeypatch)


# --- how far down training reaches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "lowest"), [(r".*layer[.]1[.].*query", 1), (["query"], 0), (["word_embeddings"], 0), (["pooler.dense"], 2)]
)
def test_the_first_trained_layer_is_the_lowest_adapted_one(targets, lowest, tiny_settings):
    settings = {**tiny_settings, "adapter": {"name": "lora", "r": 4, "target_modules": targets}}
    assert assemble(Config.from_dict(settings)).adapted.first_trained_layer == lowest


def test_the_list_shows_every_row():
    from fedpeft.listing import describe

    lines = list(describe("adapters"))
    for name, facts in FEDERABLE.items():
        assert any(line.startswith(f"{name}: ") for line in lines), name
        assert any(facts.sentence in line for line in lines), name


@pytest.mark.parametrize("name", ["fora", "lora_ga", "lora_fa from pissa", "frod"])
def test_a_resumed_run_ends_at_the_same_bits(name, tiny_settings, tmp_path, monkeypatch):
    """Clients that are new after a restart get what they cannot draw: merges of round 0, and the choice of layers."""
    import shutil

    draw_nothing(monkeypatch)
    config = Config.from_dict({**tiny_settings, "adapter": section(name)})
    whole = simulate(config, tmp_path / "run").arrays
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "round-00003")
    resumed = simulate(config, tmp_path / "run", resume=True)
    assert resumed.summary["rounds_completed"] == 3
    assert resumed.summary["rejected_updates"] == 0
    for array in whole:
        np.testing.assert_array_equal(whole[array], resumed.arrays[array])


def test_c3a_starts_from_the_base_as_it_is(assembled):
    kernels = [array for name, array in assembled("c3a").adapted.read().items() if "c3a_kernel" in name]
    assert kernels
    assert not any(array.any() for array in kernels)
