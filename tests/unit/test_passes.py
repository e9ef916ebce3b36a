"""How the rows of a step are dealt into passes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.encoded import Encoded
from fedpeft.training.passes import Batch, cut, length


def batch(seat, lengths):
    inputs = [{"input_ids": np.zeros(n, np.int64)} for n in lengths]
    return Batch(seat, Encoded(inputs, np.zeros(len(lengths), np.int64), 2), np.arange(len(lengths))[::-1], 1.0 / len(lengths), None)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=6), st.integers(1, 200))
def test_every_row_is_in_one_pass_that_is_not_too_large(clients, tokens):
    batches = [batch(seat, lengths) for seat, lengths in enumerate(clients)]
    seen = []
    for one_pass in cut(batches, tokens):
        rows = [(part.batch, place) for part in one_pass.parts for place in part.chosen]
        seats = one_pass.seats()
        assert seats == sorted(seats) == [found.seat for found, _ in rows]
        longest = max(length(found.data, found.rows[place]) for found, place in rows)
        assert len(rows) == 1 or len(rows) * longest <= tokens
        seen += [(found.seat, place) for found, place in rows]
    assert sorted(seen) == [(seat, place) for seat, lengths in enumerate(clients) for place in range(len(lengths))]


def test_rows_of_like_length_go_together():
    passes = list(cut([batch(0, [2, 30, 3]), batch(1, [31, 2, 29])], 93))
    assert [sorted(length(part.batch.data, part.batch.rows[place]) for part in p.parts for place in part.chosen) for p in passes] == [
        [29, 30, 31],
        [2, 2, 3],
    ]
