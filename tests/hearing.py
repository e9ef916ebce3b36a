"""Hears the noise of a run, so that no test of a private run passes where the noise was left out."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from fedpeft.privacy import curator, mechanism


@contextlib.contextmanager
def noise_heard(wanted: bool):
    """Within, standard Gaussian noise is drawn, if it is wanted, by the clients' steps or by the server's release."""
    heard = []

    def listening(real):
        def gaussian(source, count):
            drawn = real(source, count)
            heard.append(drawn)
            return drawn

        return gaussian

    with pytest.MonkeyPatch.context() as patch:
        for place in (mechanism, curator):
            patch.setattr(place, "gaussian", listening(place.gaussian))
        yield
    if wanted:
        assert sum(map(len, heard)) > 200, "nobody drew noise"
        assert np.concatenate(heard).std() == pytest.approx(1.0, abs=0.15)
