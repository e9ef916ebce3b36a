"""Products with frozen weights by oneDNN: the numbers of torch's own, and only where nothing else is wanted of a layer."""

import pytest
import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedpeft import frozen_linear


@pytest.fixture
def used(monkeypatch):
    """Makes this machine one that gains; the list grows with every product by oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("torch was built without oneDNN")
    calls, onednn = [], frozen_linear._onednn
    monkeypatch.setattr(frozen_linear, "gains", lambda: True)
    monkeypatch.setattr(frozen_linear, "_onednn", lambda *given: calls.append(1) or onednn(*given))
    return calls


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def frozen(layer):
    return layer.requires_grad_(False)


class Model(torch.nn.Sequential):
    def get_output_embeddings(self):
        return self[-1] if isinstance(self[-1], torch.nn.Linear) and self[-1].out_features == 99 else None


def close(found, expected):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24), (2, 3, 4, 24), (1, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(shape, bias, used):
    W, b = drawn(16, 24), drawn(16) if bias else None
    x, g = drawn(*shape).requires_grad_(), drawn(*shape[:-1], 16)
    y = frozen_linear.product(x, W, b)
    y.backward(g)
    other = x.detach().clone().requires_grad_()
    expected = functional.linear(other, W, b)
    expected.backward(g)
    close(y, expected)
    close(x.grad, other.grad)
    assert len(used) == 2, "forward and backward"


def test_what_comes_out_may_be_changed_in_place(used):
    """As several of PEFT's layers do."""
    x, W = drawn(2, 5, 24).requires_grad_(), drawn(16, 24)
    y = frozen_linear.product(x, W)
    y += 1.0
    (y * y).sum().backward()
    other = x.detach().clone().requires_grad_()
    (functional.linear(other, W) + 1.0).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_inputs_and_weights_may_lie_as_they_like(used):
    x, W = drawn(24, 7).t(), drawn(24, 16).t()
    close(frozen_linear.product(x, W), functional.linear(x, W))
    picked = drawn(5, 9, 24)[:, 0]
    close(frozen_linear.product(picked, W), functional.linear(picked, W))
    for b in (drawn(20, 4)[:16, 3], drawn(1).expand(16)):
        close(frozen_linear.product(x, W, b), functional.linear(x, W, b))
    assert len(used) == 4


def test_gradients_of_gradients(used):
    x, W = drawn(3, 24).requires_grad_(), drawn(16, 24)
    (first,) = torch.autograd.grad(frozen_linear.product(x, W).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    G = W.T @ W  # of the form x G x
    torch.testing.assert_close(second, 8 * x.detach() @ G @ G, atol=1e-3, rtol=1e-4)
    assert len(used) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_go_by_torch(dtype, used):
    x, W = drawn(3, 24).to(dtype), drawn(16, 24).to(dtype)
    assert torch.equal(frozen_linear.product(x, W), functional.linear(x, W))
    assert frozen_linear.product(drawn(0, 24), drawn(16, 24)).shape == (0, 16)
    assert used == []


def test_installed_are_frozen_linear_layers_alone(used):
    norm, own, output = torch.nn.LayerNorm(24), torch.nn.Linear(24, 24), frozen(torch.nn.Linear(24, 99))
    half = frozen(torch.nn.Linear(24, 24))
    half.bias.requires_grad_()
    model = Model(frozen(torch.nn.Linear(8, 24)), norm, own, half, frozen(Conv1D(24, 24)), output)
    x = drawn(3, 5, 8)
    expected = model(x)
    frozen_linear.install(model)
    close(model(x), expected)
    assert len(used) == 2, "the first layer and GPT-2's"
    assert [number for number, layer in enumerate(model) if "forward" in vars(layer)] == [0, 4]


def test_a_layer_that_trains_later_has_its_gradient(used):
    layer = frozen(torch.nn.Linear(8, 4))
    frozen_linear.install(Model(layer))
    layer(drawn(2, 8))
    assert len(used) == 1
    layer.weight.requires_grad_()
    layer(drawn(2, 8)).sum().backward()
    close(layer.weight.grad, drawn(2, 8).sum(0).expand(4, 8))
    assert len(used) == 1


def test_what_is_written_into_a_weight_is_used(used):
    layer = frozen(torch.nn.Linear(8, 4))
    frozen_linear.install(Model(layer))
    layer(drawn(2, 8))
    layer.weight.data = drawn(4, 8)
    close(layer(drawn(2, 8)), functional.linear(drawn(2, 8), drawn(4, 8), layer.bias))


@pytest.mark.parametrize(
    ("capability", "vendor", "gains"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_it_follows_from_the_processor(capability, vendor, gains, monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(frozen_linear, "CPUINFO", cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert frozen_linear.gains.__wrapped__() is (gains and torch.backends.mkldnn.is_available())


def test_where_nothing_is_known_of_the_processor_torch_does_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(frozen_linear, "CPUINFO", tmp_path / "none")
    assert not frozen_linear.gains.__wrapped__()
