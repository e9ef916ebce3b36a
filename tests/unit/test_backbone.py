"""What is merged into a backbone stays in float32 beside a coarser base: many small merges add up."""

import numpy as np
import pytest

from fedpeft import Config
from fedpeft.records import merge_names
from fedpeft.simulations.assemble import assemble


@pytest.mark.parametrize("merges", [1, 20])
def test_merges_into_a_bfloat16_base_are_the_float64_sum(merges, tiny_settings):
    import torch

    config = Config.from_dict({**tiny_settings, "model": {**tiny_settings["model"], "dtype": "bfloat16"}, "strategy": {"name": "flora"}})
    adapted = assemble(config).adapted
    layout = adapted.layout()
    pair = layout.pairs[0]
    d_out, d_in = layout.tensors[pair.B].shape[0], layout.tensors[pair.A].shape[1]
    weight = dict(adapted.model.named_modules())[pair.module].base_layer.weight
    before = weight.detach().clone()
    generator = np.random.default_rng(0)
    merged, exact, rounded = {}, np.zeros((d_out, d_in)), before.clone()
    for round in range(1, merges + 1):
        left, right = 1e-2 * generator.normal(size=(d_out, 4)), 1e-2 * generator.normal(size=(4, d_in))
        names = merge_names(round, pair.module)
        merged |= dict(zip(names, (left.astype(np.float32), right.astype(np.float32)), strict=True))
        exact += left @ right
        rounded += torch.from_numpy(left @ right).to(torch.bfloat16)
    adapted.write({**adapted.read(), **merged})
    assert np.linalg.norm(adapted.backbone.products[pair.module].dense() - exact) < 1e-6 * np.linalg.norm(exact)
    assert torch.equal(weight, before), "the base is not touched"
    assert weight.dtype == torch.bfloat16
    lost = np.linalg.norm((rounded.float() - before.float()).numpy() - exact) / np.linalg.norm(exact)
    assert lost > 0.1, "merging into the weight itself would lose this"


def test_adapters_train_and_travel_in_float32_on_a_bfloat16_base(tiny_settings, tmp_path):
    from fedpeft import simulate

    config = Config.from_dict({**tiny_settings, "model": {**tiny_settings["model"], "dtype": "bfloat16"}})
    run = simulate(config, tmp_path / "run")
    assert {array.dtype.name for array in run.arrays.values()} == {"float32"}
    assert run.summary["rejected_updates"] == 0
