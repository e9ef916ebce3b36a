"""`Rules`: how single tensors are trained otherwise than by the run's optimiser alone. An adapter says them, every engine keeps them.

A step on tensor x with the clipped gradient g, at the rate eta of the schedule:

    x <- step(x, g M, f eta)      M = multipliers[x], the identity where none is given; f = factors[x], 1 where none is given

where `step` is the run's optimiser, or Cayley-Adam (stiefel.py) for the tensors that are `orthonormal`. A multiplier acts on
a gradient that is clipped (and noised) already: under differential privacy it is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedpeft.records import Arrays

if TYPE_CHECKING:
    import torch

    MakeOptimizer = Callable[[Sequence[dict[str, Any]], float, float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rules:
    """Exceptions by the name of the tensor; what is not named is trained as usual."""

    factors: Mapping[str, float] = field(default_factory=dict)  # on the learning rate
    multipliers: Arrays = field(default_factory=dict)  # [columns, columns], from the right onto the gradient
    orthonormal: frozenset[str] = frozenset()  # columns stay orthonormal


def optimizers(
    trained: Mapping[str, torch.nn.Parameter], rules: Rules, make: MakeOptimizer, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimisers of `trained` tensors, the run's own first; each of their groups has its "factor" on the learning rate."""
    from fedpeft.training.stiefel import CayleyAdam

    usual = {name: parameter for name, parameter in trained.items() if name not in rules.orthonormal}
    bound = {name: parameter for name, parameter in trained.items() if name in rules.orthonormal}
    made = [make(_groups(usual, rules), 0.0, weight_decay)] if usual else []
    return [*made, CayleyAdam(_groups(bound, rules))] if bound else made


def _groups(trained: Mapping[str, torch.nn.Parameter], rules: Rules) -> list[dict[str, Any]]:
    by_factor: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in trained.items():
        by_factor.setdefault(rules.factors.get(name, 1.0), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in by_factor.items()]


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every group its share of the schedule's rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
