"""The loss in chunks is the plain loss, with its gradients, and large logits never stand whole."""

import warnings

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedpeft.tasks.cross_entropy import OutputLayer, chunked, hidden_states, output_layer

N, D, V = 37, 16, 501


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def drawn(dtype, bias=False, softcap=None):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    layer = OutputLayer(
        0.3 * torch.randn(V, D, generator=generator, dtype=dtype),
        torch.randn(V, generator=generator, dtype=dtype) if bias else None,
        softcap,
    )
    return hidden, layer, torch.randint(0, V, (N,), generator=generator), torch.randn(N, generator=generator, dtype=dtype)


def plain(hidden, layer, labels):
    z = functional.linear(hidden, layer.weight, layer.bias).to(torch.promote_types(hidden.dtype, torch.float32))
    z = z if layer.softcap is None else layer.softcap * torch.tanh(z / layer.softcap)
    return functional.cross_entropy(z, labels, reduction="none"), z.argmax(dim=1)


@pytest.mark.parametrize("most", [1, 3 * V, 10 * N * V])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_losses_and_gradients_are_the_plain_ones(dtype, within, bias, softcap, most):
    hidden, layer, labels, weights = drawn(dtype, bias, softcap)
    expected, likeliest = plain(hidden, layer, labels)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    losses, found = chunked(hidden, layer, labels, most)
    (own,) = torch.autograd.grad((losses * weights).sum(), hidden)
    assert float((losses - expected).abs().max() / expected.abs().max()) < within
    assert float((own - gradient).abs().max() / gradient.abs().max()) < within
    assert torch.equal(found, likeliest)


def test_of_bfloat16_the_loss_is_float32():
    hidden, layer, labels, _ = drawn(torch.bfloat16)
    losses, _ = chunked(hidden, layer, labels, 3 * V)
    expected, _ = plain(hidden, layer, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    losses.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_tensor_is_as_large_as_the_logits(softcap):
    hidden, layer, labels, weights = drawn(torch.float32, softcap=softcap)
    with Largest() as seen:
        (chunked(hidden, layer, labels, 4 * V)[0] * weights).sum().backward()
    assert seen.numbers == max(4 * V, V * D), "four positions at a time, and the weights"
    with Largest() as whole:
        (plain(hidden, layer, labels)[0] * weights).sum().backward()
    assert whole.numbers == N * V


def test_nothing_is_kept_where_no_gradient_is_wanted():
    hidden, layer, labels, _ = drawn(torch.float32)
    with torch.no_grad(), Largest() as seen:
        losses, _ = chunked(hidden, layer, labels, V)
    assert not losses.requires_grad
    assert seen.numbers == V * D, "the weights"


def test_no_positions_cost_nothing():
    hidden, layer, labels, _ = drawn(torch.float32)
    losses, likeliest = chunked(hidden[:0], layer, labels[:0])
    assert losses.shape == likeliest.shape == (0,)
    losses.sum().backward()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def of(name, **own):
    def make():
        import transformers

        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
        config = getattr(transformers, f"{name}Config")(vocab_size=V, **sizes, **own)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


MODELS = {
    "gpt2": gpt2,
    "llama": of("Llama"),
    "qwen2": of("Qwen2"),
    "gemma": of("Gemma", head_dim=8),
    "gemma2": of("Gemma2", head_dim=8, final_logit_softcapping=2.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_loss_of_its_logits(name):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = MODELS[name]().requires_grad_(False).eval()
        ids, embedded = torch.randint(3, V, (3, 9)), None
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    layer = output_layer(model)
    assert layer is not None
    assert (layer.softcap is not None) == (name == "gemma2")
    wanted = ids[:, 1:].reshape(-1)
    logits = model(inputs_embeds=embedded).logits[:, :-1].reshape(-1, V).float()
    expected = functional.cross_entropy(logits, wanted, reduction="none")
    hidden = hidden_states(model, {"inputs_embeds": embedded})[:, :-1].reshape(-1, layer.weight.shape[1])
    losses, likeliest = chunked(hidden, layer, wanted, 5 * V)
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(likeliest, logits.argmax(dim=1))
    gradients = [torch.autograd.grad(found.sum(), embedded, retain_graph=True)[0] for found in (expected, losses)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_an_output_layer_that_trains_or_is_scaled_is_left_to_the_plain_loss():
    with torch.random.fork_rng():
        model = MODELS["llama"]().requires_grad_(False)
        granite = of("Granite", logits_scaling=3.0)().requires_grad_(False)
    assert output_layer(granite) is None
    model.lm_head.weight.requires_grad_()
    assert output_layer(model) is None


def test_a_language_model_with_an_adapter_makes_its_logits_in_chunks(monkeypatch):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedpeft.tasks import next_token

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    bare = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    model = get_peft_model(bare, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    inputs = {"input_ids": torch.randint(97, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    labels = torch.where(torch.rand(3, 7) < 0.6, inputs["input_ids"], -100)
    found = next_token.scores(model, inputs, labels)
    found.loss.sum().backward()
    adapter = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert next_token.output_layer(model) is not None
    monkeypatch.setattr(next_token, "output_layer", lambda model: None)
    plain = next_token.scores(model, inputs, labels)
    plain.loss.sum().backward()
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(adapter[name], p.grad, rtol=1e-4, atol=1e-6)
