"""What a server may ask of every client before round 1: sums over its data, which add up over clients exactly.

A survey has two halves: `measure` at the client, `finish` at the server on the sum of all answers. It is a function of
private data and travels without noise: under differential privacy it has to be paid for.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.lookup import Settings
from fedpeft.records import Arrays, Layout, TensorSpec
from fedpeft.sections import TrainingSection
from fedpeft.training import evaluate


class Nothing(Settings):
    """No survey: the head stays as it was drawn from the seed."""

    asks: ClassVar[bool] = False


class ClassStatistics(Settings):
    """The head as a linear discriminant of the frozen features h, from three sums that clients add up.

        n_c = #{i: y_i = c},   m_c = sum_{i: y_i = c} h_i,   S = sum_i h_i h_i^T,   C classes, d features, N = sum_c n_c
        mu = sum_c m_c / N,   nu_c = m_c / n_c - mu
        T = (S - N mu mu^T) / (N - 1),   Sigma = (S - N mu mu^T - sum_c n_c nu_c nu_c^T) / (N - C)
        w_c = (Sigma + rho tr(T)/d I)^{-1} nu_c,   b_c = -w_c^T mu - 1/2 nu_c^T w_c + log((n_c + 1) / (N + C)),   rho = 0.1 + d/N

    Fisher's discriminant with one covariance for all classes (Fisher 1936; Hastie, Tibshirani and Friedman, The Elements
    of Statistical Learning, 4.3); exact in a federation, since only sums travel. The ridge, ours, grows where examples
    are scarce: with fewer than d of them Sigma is singular, and a head that trusts it is sure of everything. A class
    without examples gets weight zero and the smallest prior.
    """

    asks: ClassVar[bool] = True

    def expects(self, layout: Layout) -> dict[str, TensorSpec]:
        """What a client's answer looks like."""
        assert layout.output_weight is not None
        classes, features = layout.tensors[layout.output_weight].shape
        shapes: dict[str, tuple[int, ...]] = {"counts": (classes,), "sums": (classes, features), "squares": (features, features)}
        return {name: TensorSpec(shape, "float64") for name, shape in shapes.items()}

    def measure(self, adapted: Adapted, task: Any, data: Encoded, training: TrainingSection) -> Arrays:
        """One client's sums in float64: counts [classes], sums [classes, features], squares [features, features]."""
        hook = adapted.output_layer().register_forward_hook(lambda layer, inputs, output: inputs[0])
        try:
            h = evaluate.logits(adapted, data, training.per_device_eval_batch_size).astype(np.float64)  # [examples, features]
        finally:
            hook.remove()
        member = np.eye(data.label_count)[data.labels]  # [examples, classes]
        return {"counts": member.sum(axis=0), "sums": member.T @ h, "squares": h.T @ h}

    def finish(self, total: Arrays, layout: Layout) -> Arrays:
        """The head's output layer from the sums over all clients."""
        n, m, S = total["counts"], total["sums"], total["squares"]
        N, C, d = n.sum(), *m.shape
        mu = m.sum(axis=0) / N
        nu = np.where(n[:, None] > 0, m / np.maximum(n, 1)[:, None] - mu, 0.0)
        around_mean = S - N * np.outer(mu, mu)
        sigma = (around_mean - (nu * n[:, None]).T @ nu) / max(1.0, N - C)
        ridge = (0.1 + d / N) * np.trace(around_mean) / max(1.0, N - 1) / d
        w = np.linalg.solve(sigma + max(ridge, np.finfo(np.float32).tiny) * np.eye(d), nu.T).T
        b = -w @ mu - 0.5 * (w * nu).sum(axis=1) + np.log((n + 1) / (N + C))
        assert layout.output_weight is not None
        found = {layout.output_weight: w.astype(np.float32)}
        if layout.output_bias is not None:
            found[layout.output_bias] = b.astype(np.float32)
        return found
