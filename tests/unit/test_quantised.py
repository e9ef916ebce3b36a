"""A quantised base: what is refused without a GPU, and that merges stay beside weights that no longer are numbers to add to.

No machine of ours has bitsandbytes and a GPU: a layer of our own keeps int8 weights instead.
"""

import numpy as np
import pytest
import torch

from fedpeft import Config, UserError
from fedpeft.adapters.adapter import WANTS_FLOATS
from fedpeft.adapters.lora import Lora
from fedpeft.records import merge_names
from fedpeft.simulations.assemble import assemble


class Int8Linear(torch.nn.Linear):
    """A linear layer that holds round(127 W / max |W|) and gives the floating-point weight back for each call alone."""

    @classmethod
    def of(cls, layer):
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.scale = float(layer.weight.abs().max()) / 127
        made.weight = torch.nn.Parameter((layer.weight / made.scale).round().to(torch.int8), requires_grad=False)
        made.bias = layer.bias
        return made

    def forward(self, input):
        return torch.nn.functional.linear(input, self.weight.float() * self.scale, self.bias)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_without_a_gpu_it_is_refused_before_anything_is_read(bits, tiny_lm_settings):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = Config.from_dict({**tiny_lm_settings, "model": {**tiny_lm_settings["model"], "quantization": bits}})
    with pytest.raises(UserError, match=f"model.quantization: {bits} needs a CUDA GPU, and torch finds none here; allowed: null"):
        assemble(config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_decomposes_the_weights_is_refused(init, tiny_llama):
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_llama))
    skeleton.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(UserError, match=WANTS_FLOATS):
        Lora(init=init).check(skeleton, "CAUSAL_LM")
    Lora(target_modules=["q_proj"]).check(skeleton, "CAUSAL_LM")


def test_merges_stay_beside_a_quantised_base(tiny_lm_settings):
    """The output grows by exactly the merged product; the int8 weights are the same bytes as before."""
    parts = assemble(Config.from_dict(tiny_lm_settings))
    adapted = parts.adapted
    modules = dict(adapted.model.named_modules())
    for pair in adapted.layout().pairs:
        modules[pair.module].base_layer = Int8Linear.of(modules[pair.module].base_layer)
    pair = adapted.layout().pairs[0]
    layer = modules[pair.module].base_layer
    before, x = layer.weight.clone(), torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    plain = layer(x)
    left, right = merge_names(1, pair.module)
    rng = np.random.default_rng(0)
    L, R = rng.standard_normal((layer.out_features, 2)).astype(np.float32), rng.standard_normal((2, layer.in_features)).astype(np.float32)
    adapted.write({left: L, right: R})
    torch.testing.assert_close(layer(x) - plain, x @ torch.from_numpy(L @ R).T, atol=1e-4, rtol=1e-4)
    assert torch.equal(layer.weight, before)
