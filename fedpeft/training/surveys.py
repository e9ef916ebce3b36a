"""What a server may ask of every client before round 1: sums over its data, which add up over clients exactly.

A survey has two halves: `measure` at the client, `finish` at the server on the sum of all answers. It is a function of
private data and travels without noise: under differential privacy it has to be paid for.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from fedpeft.adapters.adapted import Adapted
from fedpeft.data.encoded import Encoded
from fedpeft.lookup import Settings
from fedpeft.records import Arrays, Layout
from fedpeft.training import evaluate


class Nothing(Settings):
    """No survey: the head stays as it was drawn from the seed."""

    asks: ClassVar[bool] = False


class ClassStatistics(Settings):
    """The head as a linear discriminant of the frozen features h, from three sums that clients add up.

        n_c = #{i: y_i = c},   m_c = sum_{i: y_i = c} h_i,   S = sum_i h_i h_i^T
        mu_c = m_c / n_c,   Sigma = (S - sum_c n_c mu_c mu_c^T) / (N - C) + rho tr(Sigma)/d I
        w_c = Sigma^{-1} mu_c,   b_c = -1/2 mu_c^T w_c + log((n_c + 1) / (N + C))

    Fisher's discriminant with one covariance for all classes; exact in a federation, since only sums travel. The ridge
    rho keeps Sigma invertible when a class has few examples; the weights are centred, which changes no prediction.
    """

    asks: ClassVar[bool] = True
    rho: ClassVar[float] = 0.1

    def measure(self, adapted: Adapted, data: Encoded, batch_size: int) -> Arrays:
        """One client's sums in float64: counts [classes], sums [classes, features], squares [features, features]."""
        hook = adapted.output_layer().register_forward_hook(lambda layer, inputs, output: inputs[0])
        try:
            h = evaluate.logits(adapted, data, batch_size).astype(np.float64)  # [examples, features]
        finally:
            hook.remove()
        member = np.eye(data.label_count)[data.labels]  # [examples, classes]
        return {"counts": member.sum(axis=0), "sums": member.T @ h, "squares": h.T @ h}

    def finish(self, total: Arrays, layout: Layout) -> Arrays:
        """The head's output layer from the sums over all clients; a class without examples gets weight zero."""
        n, m, squares = total["counts"], total["sums"], total["squares"]
        mu = m / np.maximum(n, 1)[:, None]
        scatter = squares - (mu * n[:, None]).T @ mu
        sigma = scatter / max(1.0, n.sum() - len(n))
        sigma += self.rho * np.trace(sigma) / len(sigma) * np.eye(len(sigma))
        w = np.linalg.solve(sigma, mu.T).T
        b = -0.5 * (w * mu).sum(axis=1) + np.log((n + 1) / (n.sum() + len(n)))
        assert layout.output_weight is not None
        found = {layout.output_weight: (w - w.mean(axis=0)).astype(np.float32)}
        if layout.output_bias is not None:
            found[layout.output_bias] = (b - b.mean()).astype(np.float32)
        return found
