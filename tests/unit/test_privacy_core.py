"""Accounting against published and independent values, the ledger against crashes and edits, noise against its distribution,
per-example gradients against one backward pass a record and against Opacus."""

import json
import math

import numpy as np
import pytest

from fedpeft import UserError
from fedpeft.privacy import noise, per_example
from fedpeft.privacy.accounting import Release, affordable, epsilon, grouped, sigma_for, upper_bound
from fedpeft.privacy.ledger import Ledger
from fedpeft.privacy.mechanism import Mechanism, clipped_sum, released

# q, sigma, steps, delta, RDP (Opacus and Google agree), PLD (Google's, an independent method)
REFERENCE = [
    (256 / 60000, 1.1, 14062, 1e-5, 2.5966, 2.3817),
    (0.01, 4.0, 10000, 1e-5, 1.0355, 0.9470),
    (0.01, 1.0, 1000, 1e-5, 2.1014, 1.8282),
    (0.001, 0.8, 10000, 1e-6, 1.7036, 0.9473),
    (0.02, 1.5, 2500, 1e-5, 3.5194, 3.2320),
    (0.1, 2.0, 300, 1e-4, 3.9917, 3.5965),
    (0.04, 1.5, 2250, 1e-5, 7.3291, 6.7688),
    (1.0, 1.0, 1, 1e-5, 4.7285, 4.3772),
    (0.05, 0.6, 200, 1e-4, 15.2270, 13.1187),
]


@pytest.mark.parametrize(("q", "sigma", "steps", "delta", "rdp", "pld"), REFERENCE)
def test_epsilons_are_the_reference_ones(q, sigma, steps, delta, rdp, pld):
    history = [Release(sigma, q, steps)]
    assert upper_bound(history, delta) == pytest.approx(rdp, abs=1e-3)
    found = epsilon(history, delta)
    assert 0 <= found - pld < 0.0115, "an upper bound, and close"
    assert found <= upper_bound(history, delta)


def test_a_federated_client_is_composed_over_the_whole_run():
    """n = 500, batch 16, 50 rounds of 10 steps: not one round's epsilon, nor their sum, nor what q over all clients would give."""
    rounds = [Release(1.0, 16 / 500, 10)] * 50
    assert epsilon(rounds, 1e-5) == pytest.approx(4.62, abs=0.011)
    assert grouped(rounds) == (Release(1.0, 16 / 500, 500),)
    assert epsilon(rounds[:1], 1e-5) == pytest.approx(1.16, abs=0.011)


def test_corners():
    assert epsilon([], 1e-5) == 0
    assert epsilon([Release(0.0, 0.1, 1)], 1e-5) == math.inf
    assert not affordable([Release(0.0, 0.1, 1)], 1e-5, 100.0)
    assert upper_bound([Release(100.0, 0.001, 10)], 1e-5) < 0.05, "large orders are there for small epsilons"
    hardly_any = [Release(1e-4, 0.0427, 12)]
    assert epsilon(hardly_any, 1e-5) == upper_bound(hardly_any, 1e-5) > 1e6, "a grid for PRV would take terabytes"


@pytest.mark.parametrize(
    ("target", "q", "steps", "spent", "sigma"),
    [(8.0, 0.04, 2000, (), 1.2915), (4.0, 16 / 500, 300, (Release(1.0, 16 / 500, 200),), 1.16), (4.0, 16 / 500, 500, (), 1.077)],
)
def test_sigma_is_solved_for_the_whole_run_also_when_budget_is_spent(target, q, steps, spent, sigma):
    found = sigma_for(target, 1e-5, q, steps, spent)
    assert found == pytest.approx(sigma, abs=4e-3)
    assert 0.99 * target < epsilon((*spent, Release(found, q, steps)), 1e-5) <= target


def test_no_sigma_when_nothing_is_left():
    assert sigma_for(4.0, 1e-5, 16 / 500, 300, (Release(1.0, 16 / 500, 500),)) is None


# --- ledger ----------------------------------------------------------------------------------------------------------


def test_a_ledger_survives_restarts_and_a_torn_line(tmp_path):
    path = tmp_path / "ledger" / "client-0.jsonl"
    for round in range(3):
        Ledger(path).reserve(round, Release(1.0, 0.05, 10))
    with path.open("ab") as file:
        file.write(b'{"prev": "torn')
    again = Ledger(path)
    assert again.history == (Release(1.0, 0.05, 10),) * 3
    again.reserve(3, Release(2.0, 0.05, 10))
    assert Ledger(path).history == (*(Release(1.0, 0.05, 10),) * 3, Release(2.0, 0.05, 10))


@pytest.mark.parametrize("edit", ["dropped", "changed", "swapped", "junk"])
def test_an_edited_ledger_is_refused(edit, tmp_path):
    path = tmp_path / "client-0.jsonl"
    ledger = Ledger(path)
    for round in range(4):
        ledger.reserve(round, Release(1.0 + round, 0.05, 10))
    lines = path.read_bytes().splitlines(keepends=True)
    if edit == "dropped":
        lines = lines[1:]
    elif edit == "changed":
        lines[1] = json.dumps({**json.loads(lines[1]), "steps": 1}).encode() + b"\n"
    elif edit == "swapped":
        lines[1], lines[2] = lines[2], lines[1]
    else:
        lines[1] = b"junk\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="the file was edited, or lost lines"):
        Ledger(path)


def test_a_kill_right_after_the_reservation_is_counted(tmp_path):
    """The process dies between reserving and releasing: what is on disk is never less than what may have left."""
    import os
    import signal
    import subprocess
    import sys

    path = tmp_path / "client-0.jsonl"
    code = (
        "import os, signal, pathlib, sys\n"
        "from fedpeft.privacy.ledger import Ledger\nfrom fedpeft.privacy.accounting import Release\n"
        f"Ledger(pathlib.Path({str(path)!r})).reserve(1, Release(1.0, 0.05, 10)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert Ledger(path).history == (Release(1.0, 0.05, 10),)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_a_reservation_that_cannot_be_written_is_not_there(tmp_path, monkeypatch):
    """A full disk once: the next one follows from the one before, in the file as in memory."""
    import os

    ledger = Ledger(tmp_path / "ledger" / "a.jsonl")
    ledger.reserve(1, Release(2.0, 0.1, 5))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.reserve(2, Release(2.0, 0.1, 5))
    ledger.reserve(2, Release(3.0, 0.1, 5))
    assert Ledger(ledger.path).history == ledger.history == (Release(2.0, 0.1, 5), Release(3.0, 0.1, 5))


def full(number):
    raise OSError(28, "No space left on device")


def test_large_deltas_need_hardly_any_noise_and_no_negative_epsilon():
    assert epsilon([Release(1, 0.1, 1)], 0.3) == 0.0
    for target, delta, q in ((1.0, 0.3, 0.1), (0.5, 0.4, 0.5)):
        sigma = sigma_for(target, delta, q, 1)
        assert sigma > 0 and epsilon([Release(sigma, q, 1)], delta) <= target


@pytest.mark.parametrize("source", [noise.Secure(), noise.Insecure(0, 1, 2)])
def test_noise_is_a_standard_gaussian(source):
    from scipy.stats import kstest

    drawn = noise.gaussian(source, 50_000)
    assert kstest(drawn, "norm").pvalue > 1e-4
    assert np.corrcoef(drawn[1:], drawn[:-1])[0, 1] == pytest.approx(0, abs=0.02)
    assert abs(np.corrcoef(drawn, noise.gaussian(source, 50_000))[0, 1]) < 0.02, "never the same twice"


def test_secure_noise_cannot_be_drawn_again():
    assert not np.array_equal(noise.gaussian(noise.Secure(), 8), noise.gaussian(noise.Secure(), 8))
    assert np.array_equal(noise.gaussian(noise.Insecure(0, 1, 2), 8), noise.gaussian(noise.Insecure(0, 1, 2), 8))
    assert not np.array_equal(noise.gaussian(noise.Insecure(0, 1, 2), 8), noise.gaussian(noise.Insecure(0, 2, 2), 8))


def test_batches_are_poisson():
    source, q, n = noise.Secure(), 0.1, 200
    drawn = [noise.poisson(source, n, q) for _ in range(3000)]
    sizes = np.array(list(map(len, drawn)))
    assert sizes.mean() == pytest.approx(q * n, abs=4 * np.sqrt(n * q * (1 - q) / 3000))
    assert sizes.var() == pytest.approx(n * q * (1 - q), rel=0.15), "a shuffled pass would have none"
    often = np.bincount(np.concatenate(drawn), minlength=n)
    assert np.abs(often - 3000 * q).max() < 5 * np.sqrt(3000 * q * (1 - q))


# --- the step --------------------------------------------------------------------------------------------------------


def test_a_record_moves_the_sum_by_at_most_C_whatever_it_is():
    import torch

    generator = torch.Generator().manual_seed(0)
    rows = {"a": torch.randn(7, 3, 4, generator=generator), "b": torch.randn(7, 5, generator=generator)}
    plain = clipped_sum(rows, 0.5)
    for evil in (1e4, float("inf"), float("nan"), 0.0):
        more = {name: torch.cat([row, torch.full_like(row[:1], evil)]) for name, row in rows.items()}
        changed = clipped_sum(more, 0.5)
        moved = torch.cat([(changed[name] - plain[name]).flatten() for name in rows]).norm()
        assert moved <= 0.5 * (1 + 1e-6), evil
    norms = torch.cat([row.flatten(1) for row in rows.values()], dim=1).norm(dim=1)
    for name, row in rows.items():
        wanted = sum(row[i] * min(1.0, 0.5 / float(norms[i])) for i in range(7))
        torch.testing.assert_close(plain[name], wanted)


def test_what_is_released_is_noise_of_sigma_C_over_the_expected_batch():
    import torch
    from scipy.stats import kstest

    mechanism = Mechanism(sigma=2.0, C=0.5, q=0.1, batch=16.0, noise=noise.Secure())
    empty = released(mechanism, {"a": torch.zeros(200, 100)})["a"].flatten().numpy()
    assert kstest(empty * 16.0 / (2.0 * 0.5), "norm").pvalue > 1e-4
    still = released(Mechanism(0.0, 0.5, 0.1, 16.0, noise.Secure()), {"a": torch.ones(3)})["a"]
    torch.testing.assert_close(still, torch.full((3,), 1 / 16))


# --- per-example gradients -------------------------------------------------------------------------------------------


def peft_model(kind, targets, **own):
    """A tiny random model of `kind` with LoRA that is not zero anywhere, and a function from it to per-record losses."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
        )
        base, task = transformers.ViTForImageClassification(config), None
        inputs = {"pixel_values": torch.randn(5, 3, 8, 8)}
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
        if kind == "bert":
            sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        named = {"bert": transformers.BertConfig, "llama": transformers.LlamaConfig}[kind](**sizes, pad_token_id=0, num_labels=3)
        base, task = transformers.AutoModelForSequenceClassification.from_config(named), "SEQ_CLS"
        inputs = {"input_ids": torch.randint(1, 50, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    model = get_peft_model(base, LoraConfig(task_type=task, r=3, lora_alpha=7, target_modules=targets, **own))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def losses(rows):
        taken = {name: value[rows] for name, value in inputs.items()}
        return model(**taken).logits.float().logsumexp(dim=1)

    return model.eval(), losses


MODELS = [("bert", ["query", "value"], {}), ("llama", "all-linear", {"use_rslora": True}), ("vit", r".*attention.*(q_proj|query)", {})]


@pytest.mark.parametrize("frozen", ["", "lora_A"])
@pytest.mark.parametrize(("kind", "targets", "own"), MODELS)
def test_rows_are_one_backward_pass_a_record(kind, targets, own, frozen):
    import torch

    model, losses = peft_model(kind, targets, **own)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad and not (frozen and frozen in name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    assert not per_example.uncovered(model, names)
    with per_example.watching(model, names, 5) as rows:
        losses(torch.arange(5)).sum().backward()
    assert all(parameter.grad is None for parameter in names.values())
    for record in range(5):
        model.zero_grad()
        losses(torch.tensor([record])).sum().backward()
        for name, parameter in names.items():
            torch.testing.assert_close(rows[name][record], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_rows_under_gradient_checkpointing(reentrant):
    import torch

    model, losses = peft_model("bert", ["query", "value"])
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with per_example.watching(model, names, 5) as plain:
        losses(torch.arange(5)).sum().backward()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.base_model.model.enable_input_require_grads()
    model.train()
    with per_example.watching(model, names, 5) as rows:
        losses(torch.arange(5)).sum().backward()
    for name in names:
        torch.testing.assert_close(rows[name], plain[name], rtol=1e-4, atol=1e-6)


def test_rows_are_those_of_opacus():
    import torch
    from opacus.grad_sample import GradSampleModule

    model, losses = peft_model("bert", ["query", "value"])
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with per_example.watching(model, names, 5) as rows:
        losses(torch.arange(5)).sum().backward()
    hooked = GradSampleModule(model.train(), loss_reduction="sum")
    losses(torch.arange(5)).sum().backward()
    for name, parameter in names.items():
        torch.testing.assert_close(rows[name], parameter.grad_sample, rtol=1e-4, atol=1e-6)
    hooked.remove_hooks()


def test_a_parameter_that_no_linear_layer_owns_is_named():
    model, _ = peft_model("bert", ["query"])
    names = dict(model.named_parameters())
    found = per_example.uncovered(model, {name: names[name] for name in names if "LayerNorm" in name or "lora" in name})
    assert found
    assert all("LayerNorm" in name for name in found)


def test_planted_errors_of_the_step_are_caught(monkeypatch):
    """No clipping, clipping the batch, no noise, noise over the actual batch: each fails the test that is there for it."""
    import sys

    import torch

    here = sys.modules[__name__]

    def unclipped(rows, C):
        return {name: row.sum(dim=0) for name, row in rows.items()}

    def batch_clipped(rows, C):
        whole = {name: row.nan_to_num().clamp(-1e3, 1e3).sum(dim=0) for name, row in rows.items()}
        norm = torch.cat([value.flatten() for value in whole.values()]).norm()
        return {name: value * min(1.0, C / float(norm)) for name, value in whole.items()}

    def noiseless(mechanism, total):
        return {name: value / mechanism.batch for name, value in total.items()}

    real = released
    for name, mutant, test in (
        ("clipped_sum", unclipped, test_a_record_moves_the_sum_by_at_most_C_whatever_it_is),
        ("clipped_sum", batch_clipped, test_a_record_moves_the_sum_by_at_most_C_whatever_it_is),
        ("released", noiseless, test_what_is_released_is_noise_of_sigma_C_over_the_expected_batch),
        (
            "released",
            lambda m, t: real(Mechanism(m.sigma / m.batch, m.C, m.q, m.batch, m.noise), t),
            test_what_is_released_is_noise_of_sigma_C_over_the_expected_batch,
        ),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(here, name, mutant)
            with pytest.raises(AssertionError):
                test()
