"""Means, intervals and paired differences, against scipy and against sums done by hand."""

import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from fedpeft.intervals import estimate, student_t
from fedpeft.runs import Run
from fedpeft.simulations.study_results import Cell, Results, paired
from fedpeft.simulations.study_tables import arm_table


def cell(arm, seed, final):
    """A finished cell, or with None a failed one."""
    if final is None:
        return Cell(arm, {}, seed, None, "it broke")
    summary = {"primary_metric": "accuracy", "metrics": {"accuracy": final}, "bytes_up": 600, "bytes_down": 400, "seconds": {"total": 2.0}}
    return Cell(arm, {}, seed, Run(pathlib.Path(), summary, (), {"data": {"evaluate_on": "test"}}))


def columns(results):
    """The table for people, arm by arm."""
    head, _, *rows = [[word.strip() for word in line.strip("|").split(" | ")] for line in arm_table(results).splitlines()]
    return head, {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_students_t_is_scipys(confidence):
    degrees = [*range(1, 41), 99, 100, 1000]
    expected = [stats.t.ppf((1 + confidence) / 2, number) for number in degrees]
    np.testing.assert_allclose([student_t(confidence, number) for number in degrees], expected, rtol=1e-11)


def test_an_interval_is_scipys():
    for count in (2, 3, 8):
        values = np.random.default_rng(count).normal(0.8, 0.02, count)
        found, expected = estimate(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert found.values == count
        np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [expected.low, expected.high])


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert estimate([0.7]) == (1, 0.7, None)
    assert estimate([]) == (0, None, None)


def test_what_is_no_number_stays_no_number():
    found = estimate([0.5, math.nan])
    assert math.isnan(found.mean)
    assert math.isnan(found.half_width)


def test_a_paired_difference_is_that_of_the_hand_calculation():
    """Differences 0.02, 0.04, 0.06: mean 0.04, s = 0.02, t(0.975, 2) = 4.302653, half width 4.302653 x 0.02 / sqrt(3) = 0.049683.

    The arm itself: 0.52, 0.74, 0.66, so s^2 = 0.0124, and 4.302653 x sqrt(0.0124 / 3) = 0.276622.
    """
    first = [cell("a", seed, final) for seed, final in enumerate((0.50, 0.70, 0.60))]
    other = [cell("b", seed, final) for seed, final in enumerate((0.52, 0.74, 0.66))]
    found = paired(other, first)
    assert found.values == 3
    assert found.mean == pytest.approx(0.04)
    assert found.half_width == pytest.approx(0.049683, abs=1e-6)
    _, rows = columns(Results("hand", [*first, *other]))
    assert rows["b"] == ["3 of 3", "0.6400", "0.3634 to 0.9166", "+0.0400", "-0.0097 to +0.0897", "1 kB", "2 s", "-"]


def test_only_the_seeds_that_both_finished_are_paired():
    first = [cell("a", 0, 0.5), cell("a", 1, None), cell("a", 2, 0.6), cell("a", 3, 0.1)]
    other = [cell("b", 2, 0.9), cell("b", 1, 0.0), cell("b", 0, 0.6), cell("b", 3, None)]
    found = paired(other, first)
    assert found.values == 2
    assert found.mean == pytest.approx((0.1 + 0.3) / 2)


def test_a_failed_cell_counts_in_no_mean_and_is_shown():
    cells = [cell("a", 0, 0.5), cell("a", 1, 0.7), cell("b", 0, None), cell("b", 1, 0.9)]
    head, rows = columns(Results("failing", cells))
    assert head == ["arm", "seeds", "accuracy", "95 % interval", "against a", "95 % interval", "bytes", "time", "failed"]
    assert rows["a"][:2] == ["2 of 2", "0.6000"]
    assert rows["b"] == ["1 of 2", "0.9000", "-", "+0.2000", "-", "1 kB", "2 s", "1"]


def test_an_arm_of_which_nothing_finished_has_dashes():
    _, rows = columns(Results("failing", [cell("a", 0, None), cell("b", 0, 0.9)]))
    assert rows["a"] == ["0 of 1", "-", "-", "-", "-", "-", "-", "1"]
    assert rows["b"][1:5] == ["0.9000", "-", "-", "-"]
