"""What changes in a round where whole clients are private: who is asked, what `combine` is given, and what goes on record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from fedpeft.privacy.curator import CLIPPING_NORM, Curator
from fedpeft.privacy.noise import Noise
from fedpeft.privacy.statement import said
from fedpeft.records import Arrays, Metrics, RoundRecord, Update
from fedpeft.server.federation import Federation


@dataclass
class PrivateRound:
    """One round of a curator, with its own randomness."""

    curator: Curator
    noise: Noise
    round: int
    state: Arrays = field(default_factory=dict)  # what the next round has to know
    report: Metrics = field(default_factory=dict)

    def sample(self, clients: Iterable[int]) -> list[int]:
        """Those of `clients` that are asked; nobody, now and then."""
        return self.curator.sample(self.noise, clients)

    def release(self, updates: Iterable[Update], received: Arrays, federation: Federation, state: Arrays) -> list[Update]:
        """The one update that the rest of the round may see; charged on disk before it exists."""
        C = float(state.get(CLIPPING_NORM, self.curator.section.clipping_norm))
        uploads = federation.strategy.uploads(federation.trains(received), federation.at(self.round))
        released = self.curator.release(self.noise, updates, received, uploads, self.round, C)
        self.state = {CLIPPING_NORM: np.array(released.clipping_norm)}
        shown = {"clipping_norm": said(C), "below_clipping_norm": released.below}
        self.report = {name: value for name, value in shown.items() if value is not None}
        return [released.update]

    def censored(self, record: RoundRecord) -> RoundRecord:
        """The record without what clients' updates say without noise: losses, norms, numbers of examples, errors of the mean."""
        epsilon = said(self.curator.epsilon())
        return replace(record, loss=None, examples=0, client_update_norms={}, epsilon=epsilon, report=self.report)


def private_round(federation: Federation, round: int) -> PrivateRound | None:
    """The private side of `round`, where whole clients are private."""
    curator = federation.curator
    return None if curator is None else PrivateRound(curator, curator.source(round), round)
