"""The head from class statistics: scikit-learn's linear discriminant, and exact whoever holds which rows."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedpeft.arrays import total
from fedpeft.data.encoded import Encoded
from fedpeft.sections import TrainingSection
from fedpeft.simulations.assemble import assemble
from fedpeft.training import evaluate
from fedpeft.training.surveys import ClassStatistics

TRAINING = TrainingSection(per_device_eval_batch_size=8)


def features(adapted, data):
    """What the head's last layer is given, caught by a second, independent way: a pre-hook."""
    caught = []
    adapted.ready(data)  # it tries the model out, before the hook listens
    hook = adapted.output_layer().register_forward_pre_hook(lambda layer, inputs: caught.append(inputs[0].numpy()))
    for row in range(len(data)):
        evaluate.logits(adapted, data.take(np.array([row])), 1)
    hook.remove()
    return np.concatenate(caught)


@pytest.fixture
def parts(tiny_config):
    return assemble(tiny_config)


class Layout:
    output_weight, output_bias = "w", "b"


def everything(parts) -> Encoded:
    nodes = parts.worker.nodes.values()
    return Encoded([row for node in nodes for row in node.train.inputs], np.concatenate([node.train.labels for node in nodes]), 3)


def test_sums_of_clients_are_the_sums_of_all_rows(parts):
    survey = ClassStatistics()
    federated = total(survey.measure(parts.adapted, parts.task, node.train, TRAINING) for node in parts.worker.nodes.values())
    central = survey.measure(parts.adapted, parts.task, everything(parts), TRAINING)
    for name in central:
        np.testing.assert_allclose(federated[name], central[name], rtol=1e-5, atol=1e-5)


def test_statistics_are_those_of_the_features(parts):
    data = everything(parts)
    h = features(parts.adapted, data).astype(np.float64)
    sums = ClassStatistics().measure(parts.adapted, parts.task, data, TRAINING)
    np.testing.assert_allclose(sums["squares"], h.T @ h, rtol=1e-4, atol=1e-5)
    for code in range(3):
        np.testing.assert_allclose(sums["sums"][code], h[data.labels == code].sum(axis=0), rtol=1e-4, atol=1e-4)


def test_the_head_decides_like_scikit_learns_discriminant():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    h = generator.normal(size=(400, 6)) + np.array([[0] * 6, [1.5] * 6, [1.5, -1.5] * 3])[labels]
    member = np.eye(3)[labels]
    sums = {"counts": member.sum(axis=0), "sums": member.T @ h, "squares": h.T @ h}

    class Layout:
        output_weight, output_bias = "w", "b"

    found = ClassStatistics().finish(sums, Layout)
    ours = (h @ found["w"].T + found["b"]).argmax(axis=1)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(h, labels).predict(h)
    assert (ours == theirs).mean() > 0.99
    assert (ours == labels).mean() > 0.85


def test_a_class_nobody_has_is_never_predicted():
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 300)
    h = generator.normal(size=(300, 5)) + 2.0 * labels[:, None] + 7.0
    member = np.eye(3)[labels]
    found = ClassStatistics().finish({"counts": member.sum(axis=0), "sums": member.T @ h, "squares": h.T @ h}, Layout)
    assert set((h @ found["w"].T + found["b"]).argmax(axis=1)) == {0, 1}


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [1, 1]])
def test_a_handful_of_examples_still_gives_a_head(labels):
    h = np.random.default_rng(2).normal(size=(len(labels), 5))
    member = np.eye(3)[labels]
    found = ClassStatistics().finish({"counts": member.sum(axis=0), "sums": member.T @ h, "squares": h.T @ h}, Layout)
    assert all(np.isfinite(array).all() for array in found.values())
    assert ((h @ found["w"].T + found["b"]).argmax(axis=1) == labels).all()


def test_a_far_away_origin_changes_no_logit():
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 3, 200)
    member = np.eye(3)[labels]
    logits = []
    for shift in (0.0, 100.0):
        h = np.random.default_rng(4).normal(size=(200, 4)) + labels[:, None] + shift
        found = ClassStatistics().finish({"counts": member.sum(axis=0), "sums": member.T @ h, "squares": h.T @ h}, Layout)
        logits.append(h @ found["w"].astype(np.float64).T + found["b"])
    np.testing.assert_allclose(*logits, atol=2e-3)


def test_measuring_leaves_the_model_as_it_was(parts):
    before = evaluate.logits(parts.adapted, parts.test, 8)
    ClassStatistics().measure(parts.adapted, parts.task, everything(parts), TRAINING)
    assert np.array_equal(before, evaluate.logits(parts.adapted, parts.test, 8))
