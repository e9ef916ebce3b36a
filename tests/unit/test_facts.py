"""What `fedpeft list strategies` states is what the strategies do: bytes counted by hand from the papers' tables."""

import pytest

from fedpeft.listing import describe
from fedpeft.lookup import TABLES
from fedpeft.strategies.facts import D, K, R, facts

# Rows of the papers' accounting for a square matrix, P = r (d_in + d_out): up, down.
BYTES = {
    "fedavg": (1, 1),
    "ffa_lora": (0.5, 0.5),
    "lora_fair": (1, 1),
    "fedsmooth_lora": (1, 1),
    "flora_na": (1, 1),
    "flora": (1, 1 + K),
    "fedex_lora": (1, 1 + K - 1),
    "flex_lora": (1, 1),
    "ro_lora": (0.5, 1),
    "fed_svd": (0.5, 1),
    "het_lora": (1, 1),
    "fedsa_lora": (0.5, 0.5),
    "fed_sb": (R / (2 * D), R / (2 * D)),
    "fed_ask": (1, 1.5),
    "slora": (1, 1),
    "scaffold": (2, 2),
}


@pytest.mark.parametrize("name", sorted(TABLES["strategy"]))
def test_bytes_are_those_of_the_papers(name):
    found = facts(name)
    assert (found.up, found.down) == pytest.approx(BYTES.get(name, (1, 1)))
    assert "arXiv" in found.paper or "NeurIPS" in found.paper
    assert found.travels


def test_the_list_prints_every_fact():
    lines = "\n".join(describe("strategies"))
    for said in (
        "sends: core",
        "0.5 up, 0.5 down",
        "mixed ranks: yes",
        "stateful clients: yes",
        "secure aggregation: no",
        "the server keeps: sums",
        "the server keeps: every update",
        "exact: yes",
    ):
        assert said in lines
    assert lines.count("noise in training protects uploads") == len(TABLES["strategy"])


def test_one_over_another_is_no_better_than_what_is_underneath():
    assert not facts("fedprox").exact
    assert facts("fedprox").summable
    assert not facts("krum").summable
    assert facts("scaffold").travels == ("control variates", "A", "B")
