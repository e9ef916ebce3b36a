"""Fed-SB: W = W0 + s B R A, of which only the small core R [r, r] trains and travels.

    R <- sum_k p_k R_k,   so that   sum_k p_k s B R_k A = s B R A   exactly

r^2 numbers a matrix, whatever its dimensions: use a large r. A and B are frozen and equal on all clients; they travel once,
before a client's first round. How they are chosen is the adapter's affair (adapters/lora_sb.py): its gradient-based start
is a sum over private data, counted as such.

Paper: Singhal et al. 2025 (arXiv:2502.15436), section 3. The published code averages uniformly; here clients weigh p_k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from fedpeft.records import Arrays, Update
from fedpeft.strategies import aggregation
from fedpeft.strategies.strategy import Combined, Round, Strategy, streaming


class FedSb(Strategy):
    """Averages the r x r cores of LoRA-SB: exact, and the fewest bytes of all."""

    paper: ClassVar[str] = "arXiv:2502.15436"
    of_cores: ClassVar[bool] = True
    plain_mean: ClassVar[bool] = True
    from_mean: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    summable: ClassVar[bool] = True

    def sends(self, names: Sequence[str], at: Round) -> tuple[str, ...]:
        """Cores and head."""
        return tuple(sorted(set(names) - {name for pair in at.layout.pairs for name in (pair.A, pair.B)}))

    @streaming
    def combine(self, updates: Iterable[Update], received: Arrays, at: Round) -> Combined:
        """The weighted mean of cores and head; exact, which the report shows."""
        mean, error = aggregation.gather(updates, received, at)
        return Combined(mean, error(mean))
