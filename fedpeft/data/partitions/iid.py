"""iid: every client's examples are a uniform random sample of the whole."""

from __future__ import annotations

import numpy as np

from fedpeft.data.examples import Examples, Indices


def iid(examples: Examples, clients: int, generator: np.random.Generator) -> list[Indices]:
    """Equal shares of a random order; sizes differ by at most one."""
    return [np.sort(part) for part in np.array_split(generator.permutation(len(examples)), clients)]
