"""How the rows of a step are dealt into passes."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.encoded import Encoded
from fedpeft.training.passes import FEWEST, Batch, Plan, by_length, cut, deal, length


def batch(seat, lengths):
    inputs = [{"input_ids": np.zeros(n, np.int64)} for n in lengths]
    return Batch(seat, Encoded(inputs, np.zeros(len(lengths), np.int64), 2), np.arange(len(lengths))[::-1], 1.0 / len(lengths), None)


def lengths(one_pass):
    return sorted((length(part.batch.data, part.batch.rows[place]) for part in one_pass.parts for place in part.chosen), reverse=True)


SOME = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=8), min_size=1, max_size=6)


@given(SOME, st.integers(1, 200), st.none() | st.integers(1, 5), st.integers(0, 100), st.integers(1, 4))
def test_every_row_is_in_one_pass_that_is_not_too_large(clients, tokens, rows, overhead, lanes):
    batches = [batch(seat, lengths) for seat, lengths in enumerate(clients)]
    seen = []
    shares = deal(batches, lanes, Plan(tokens, rows, overhead))
    assert 1 <= len(shares) <= lanes and all(shares)
    for one_pass in [one_pass for share in shares for one_pass in share]:
        found = [(part.batch, place) for part in one_pass.parts for place in part.chosen]
        seats = one_pass.seats()
        assert seats == sorted(seats) == [batch.seat for batch, _ in found]
        assert len(found) == 1 or (len(found) * lengths(one_pass)[0] <= tokens and len(found) <= (rows or len(found)))
        seen += [(batch.seat, place) for batch, place in found]
    assert sorted(seen) == [(seat, place) for seat, lengths in enumerate(clients) for place in range(len(lengths))]


def price(passes, plan):
    return sum(len(rows) * rows[0] + plan.overhead for rows in passes)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(12, 40), st.integers(0, 20))
def test_no_other_cut_is_cheaper(rows, tokens, overhead):
    """Every way to cut eight rows is tried."""
    batches, plan = [batch(0, rows)], Plan(tokens, None, overhead)
    rows = sorted(rows, reverse=True)
    ways = []
    for borders in itertools.product([False, True], repeat=len(rows) - 1):
        ends = [0, *(place for place, border in enumerate(borders, 1) if border), len(rows)]
        passes = [rows[start:stop] for start, stop in itertools.pairwise(ends)]
        if all(len(own) * own[0] <= tokens for own in passes):
            ways.append(price(passes, plan))
    assert price([lengths(one_pass) for one_pass in cut(by_length(batches), batches, plan)], plan) == min(ways)


def test_rows_of_like_length_go_together():
    batches = [batch(0, [2, 30, 3]), batch(1, [31, 2, 29])]
    assert [lengths(one_pass) for one_pass in cut(by_length(batches), batches, Plan(1000, overhead=20))] == [[31, 30, 29], [3, 2, 2]]
    assert [lengths(one_pass) for one_pass in cut(by_length(batches), batches, Plan(62, overhead=20))] == [[31], [30, 29], [3, 2, 2]]
    assert [lengths(one_pass) for one_pass in cut(by_length(batches), batches, Plan(1000, overhead=200))] == [[31, 30, 29, 3, 2, 2]]


def test_lanes_have_equally_many_tokens():
    """Half of the tokens stand in the third of the rows that are longest."""
    batches = [batch(0, [64] * 16), batch(1, [32] * 32)]
    shares = deal(batches, 2, Plan(512, overhead=8))
    assert [sum(sum(lengths(one_pass)) for one_pass in share) for share in shares] == [1024, 1024]
    assert len(deal(batches, 100, Plan(512))) == 2048 // FEWEST


def test_few_tokens_are_one_lanes():
    assert len(deal([batch(0, [20, 20, 20])], 8, Plan(512))) == 1
