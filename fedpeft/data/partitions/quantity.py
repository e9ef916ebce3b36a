"""quantity: clients hold different amounts of the same mixture.

Paper: Li et al. 2022, arXiv:2102.02079 (section 4.3, quantity skew).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from fedpeft.data.examples import Examples, Indices
from fedpeft.data.partitions import Movable
from fedpeft.data.partitions.dirichlet import cut


def quantity(
    examples: Examples,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: Annotated[float, Field(ge=1e-6, le=1e6, description="the smaller, the more unequal the sizes; large: equal sizes")] = 0.5,
) -> list[Indices]:
    """Draw q ~ Dir(alpha, ..., alpha) once, and give client k the share q_k of all examples in random order.

    A small alpha leaves clients short of `partition.min_examples`; see `split` for what happens then.
    """
    rows = generator.permutation(len(examples))
    return Movable(np.sort(piece) for piece in cut(rows, generator.dirichlet(np.full(clients, alpha))))
