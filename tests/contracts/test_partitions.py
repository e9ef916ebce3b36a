"""Every partitioner x every property of a split, then the facts that each one promises."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.data.examples import Examples
from fedpeft.data.partitions import Partition, label_counts, split, table
from fedpeft.data.partitions.dirichlet import cut, dirichlet
from fedpeft.data.partitions.picture import draw
from fedpeft.data.partitions.quantity import quantity
from fedpeft.data.partitions.shards import shards
from fedpeft.errors import UserError
from fedpeft.lookup import TABLES, find, settings_of
from fedpeft.sections import PartitionSection

ROWS = sorted(TABLES["partitioner"])
DRAWN = [row for row in ROWS if row != "natural"]
ALWAYS_FEASIBLE = ["dirichlet", "iid", "quantity"]  # nothing but the number of examples limits them
every_row = pytest.mark.parametrize("row", ROWS)


def data(size: int, classes: int = 3, owners: int = 12, domains: int = 2, seed: int = 0) -> Examples:
    """Shuffled rows in which every class, owner and domain occurs as evenly as `size` allows."""
    order = np.random.default_rng(seed).permutation(size)
    return Examples(
        {"text": [f"row {row}" for row in range(size)]},
        labels=(order % classes).astype(np.int64),
        label_names=tuple(f"class {label}" for label in range(classes)),
        clients=tuple(f"owner {row % owners:03}" for row in order),
        domains=tuple(f"domain {row * domains // size}" for row in order),
    )


def section(row: str, clients: int | None, **settings: object) -> PartitionSection:
    """The config section, with only those of `settings` that the partitioner knows."""
    known = {"min_examples", *settings_of(find("partitioner", row)).model_fields}
    chosen = {key: value for key, value in settings.items() if key in known}
    return PartitionSection.completed(row, "partition.name")(name=row, clients=clients, **chosen)  # type: ignore[return-value]


def parts(row: str, examples: Examples, clients: int | None, seed: int = 0, **settings: object) -> Partition:
    return split(section(row, clients, **settings), examples, np.random.default_rng(seed))


def assert_each_example_once(partition: Partition, examples: Examples) -> None:
    assert sorted(row for rows in partition.indices for row in rows) == list(range(len(examples)))
    assert all(rows.dtype == np.int64 and np.array_equal(rows, np.sort(rows)) for rows in partition.indices)
    assert len(set(partition.names)) == len(partition.indices)


def same(one: Partition, other: Partition) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one.indices, other.indices, strict=True))


alphas = st.floats(-6, 6).map(lambda power: 10**power)
cases = {
    "size": st.integers(1, 80),
    "classes": st.integers(1, 6),
    "owners": st.integers(1, 8),
    "domains": st.integers(1, 3),
    "clients": st.integers(1, 12),
    "alpha": alphas,
    "minimum": st.integers(1, 5),
    "seed": st.integers(0, 99),
}
quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@every_row
@quickly
@given(classes_per_client=st.integers(1, 3), **cases)
def test_each_example_once_and_the_minimum_met_or_a_user_error(
    row, size, classes, owners, domains, clients, alpha, minimum, seed, classes_per_client
):
    examples = data(size, classes, owners, domains, seed)
    try:
        partition = parts(row, examples, clients, seed, min_examples=minimum, alpha=alpha, classes_per_client=classes_per_client)
    except UserError:
        assert row not in ALWAYS_FEASIBLE or clients * minimum > size
    else:
        assert_each_example_once(partition, examples)
        assert len(partition.indices) == clients
        assert min(map(len, partition.indices)) >= minimum


@every_row
def test_the_same_seed_gives_the_same_split_whatever_the_global_generator(row):
    np.random.seed(1)
    one = parts(row, data(120), 6, seed=7)
    np.random.seed(2)
    assert same(one, parts(row, data(120), 6, seed=7))


@pytest.mark.parametrize("row", DRAWN)
def test_another_seed_gives_another_split(row):
    assert not same(parts(row, data(120), 6, seed=7), parts(row, data(120), 6, seed=8))


@every_row
def test_one_client_gets_everything(row):
    examples = data(30, domains=1)
    partition = parts(row, examples, 1, classes_per_client=3)
    assert np.array_equal(partition.indices[0], np.arange(30))


@every_row
def test_as_many_clients_as_examples_get_one_each(row):
    partition = parts(row, data(12), 12)
    assert_each_example_once(partition, data(12))
    assert [len(rows) for rows in partition.indices] == [1] * 12


@every_row
def test_a_single_class_and_a_class_without_examples_are_dealt_too(row):
    whole = data(60, classes=4)
    for labels in (np.zeros(60, dtype=np.int64), np.where(whole.labels == 2, 1, whole.labels)):
        examples = Examples(whole.columns, labels, whole.label_names, whole.clients, whole.domains)
        partition = parts(row, examples, 6)
        assert_each_example_once(partition, examples)
        assert label_counts(partition, examples).shape == (6, 4)
        assert label_counts(partition, examples)[:, 2].sum() == 0


@every_row
def test_more_clients_than_examples_is_refused_with_both_numbers(row):
    with pytest.raises(UserError, match=r"partition\.clients.*\b31\b.*\b30\b"):
        parts(row, data(30), 31)


@every_row
def test_no_number_of_clients_means_the_owners_or_else_ten(row):
    assert len(parts(row, data(120), None).indices) == (12 if row == "natural" else 10)


@pytest.mark.parametrize(("row", "column"), [("dirichlet", "label"), ("shards", "label"), ("natural", "client"), ("domain", "domain")])
def test_a_missing_column_is_named_by_its_config_key(row, column):
    with pytest.raises(UserError, match=rf"data\.columns\.{column}"):
        parts(row, Examples({"text": ["a", "b", "c"]}), 2)


@pytest.mark.parametrize("alpha", [1e-6, 0.01])
def test_fifty_clients_meet_their_minimum_at_an_extreme_alpha_and_moves_are_counted(alpha):
    examples = data(1000, classes=10)
    partition = parts("dirichlet", examples, 50, alpha=alpha, min_examples=5)
    assert_each_example_once(partition, examples)
    assert min(map(len, partition.indices)) >= 5
    assert partition.moved > 0
    assert table(partition, examples)[2]["moved_examples"] == partition.moved
    assert parts("dirichlet", examples, 50, alpha=100.0, min_examples=5).moved == 0


def test_each_moved_example_is_counted():
    partition = parts("quantity", data(40), 5, alpha=1e-6, min_examples=4)  # all at one client; four others take four each
    assert partition.moved == 16
    assert sorted(map(len, partition.indices)) == [4, 4, 4, 4, 24]


@pytest.mark.parametrize("row", ALWAYS_FEASIBLE)
def test_a_minimum_that_takes_every_example_is_met(row):
    for seed in range(20):
        assert [len(rows) for rows in parts(row, data(60), 12, seed, alpha=0.5, min_examples=5).indices] == [5] * 12


@every_row
def test_a_minimum_beyond_the_examples_is_refused_with_the_highest_possible(row):
    with pytest.raises(UserError, match=r"partition\.min_examples: 6 for each of 12 clients .* 60 examples.*at most 5"):
        parts(row, data(60), 12, min_examples=6)


def test_a_minimum_within_reach_of_a_second_draw_moves_nothing():
    assert [parts("quantity", data(300), 5, seed, alpha=0.5, min_examples=3).moved for seed in range(20)] == [0] * 20


def test_a_class_is_cut_within_one_row_of_its_shares():
    assert [piece.tolist() for piece in cut(np.arange(10), np.array([0.5, 0.0, 0.24, 0.26]))] == [[0, 1, 2, 3, 4], [], [5, 6], [7, 8, 9]]


@pytest.mark.parametrize(("drawn", "spread"), [(dirichlet, 8), (quantity, 0.8)])
def test_shares_have_the_mean_and_variance_of_the_dirichlet_distribution(drawn, spread):
    """Dir(a, ..., a) over K: mean 1/K, variance (1/K)(1 - 1/K) / (K a + 1)."""
    examples, generator = data(1000, classes=1), np.random.default_rng(0)
    shares = np.array([[len(rows) for rows in drawn(examples, 5, generator, alpha=spread)] for _ in range(1500)]) / 1000
    np.testing.assert_allclose(shares.mean(axis=0), 0.2, atol=0.02)
    np.testing.assert_allclose(shares.var(axis=0), 0.2 * 0.8 / (5 * spread + 1), rtol=0.15)


def test_dirichlet_is_nearly_iid_for_a_large_alpha_and_skewed_for_a_small_one():
    examples = data(6000, classes=6)
    distances = [
        table(parts("dirichlet", examples, 10, alpha=alpha), examples)[2]["mean_total_variation"] for alpha in (1e6, 10, 0.5, 0.01)
    ]
    assert distances[0] < 0.01
    assert distances == sorted(distances)
    assert distances[-1] > 0.6


@quickly
@given(size=st.integers(20, 200), classes=st.integers(1, 9), clients=st.integers(1, 12), each=st.integers(1, 4), seed=st.integers(0, 99))
def test_shards_deal_at_most_k_classes_and_divide_a_class_evenly(size, classes, clients, each, seed):
    examples = data(size, classes)
    if clients * each < classes:
        with pytest.raises(UserError, match=r"partition\.classes_per_client"):
            shards(examples, clients, np.random.default_rng(seed), classes_per_client=each)
        return
    dealt = shards(examples, clients, np.random.default_rng(seed), classes_per_client=each)
    counts = np.array([np.bincount(examples.labels[rows], minlength=classes) for rows in dealt])
    assert (counts > 0).sum(axis=1).max() <= each
    assert counts.sum(axis=0).tolist() == np.bincount(examples.labels, minlength=classes).tolist()
    assert all(np.ptp(column[column > 0]) <= 1 for column in counts.T)
    assert clients > size or min(map(len, dealt)) >= 1
    if size // classes >= clients:  # rows enough of every class for every client
        assert ((counts > 0).sum(axis=1) == min(each, classes)).all()


def test_shards_give_a_larger_class_to_more_clients_so_that_sizes_stay_alike():
    examples = Examples({"text": [""] * 1000}, np.repeat([0, 1, 2, 3], [100, 100, 700, 100]))
    assert {len(rows) for rows in shards(examples, 10, np.random.default_rng(0), classes_per_client=1)} == {100}


def test_quantity_keeps_the_label_distribution_while_sizes_differ():
    examples = data(20000, classes=4)
    counts = label_counts(parts("quantity", examples, 8, alpha=0.5), examples)
    sizes = counts.sum(axis=1)
    assert sizes.max() > 4 * sizes.min()
    large = sizes > 1000
    np.testing.assert_allclose(counts[large] / sizes[large, None], 0.25, atol=0.05)


def test_natural_keeps_owners_whole_and_names_clients_after_them():
    examples = data(100, owners=7)
    partition = parts("natural", examples, None)
    assert partition.names == tuple(f"owner {owner:03}" for owner in range(7))
    assert all({examples.clients[row] for row in rows} == {name} for name, rows in zip(partition.names, partition.indices, strict=True))


def test_natural_deals_owners_whole_to_fewer_clients_of_balanced_size():
    owners = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"] * 2 + ["e"] * 2
    partition = parts("natural", Examples({"text": owners}, clients=tuple(owners)), 2)
    assert [Counter(owners[row] for row in rows) for rows in partition.indices] == [{"a": 5, "d": 2, "e": 2}, {"b": 4, "c": 3}]
    assert partition.names == ("0", "1")
    with pytest.raises(UserError, match=r"partition\.clients: 6 clients.* 5 owners"):
        parts("natural", Examples({"text": owners}, clients=tuple(owners)), 6)


def test_an_owner_below_the_minimum_is_refused_by_name_and_never_filled_up():
    owners = ("ann",) * 9 + ("bob",)
    with pytest.raises(UserError, match=r"partition\.min_examples: 1 of 2 clients.*bob \(1\)"):
        parts("natural", Examples({"text": owners}, clients=owners), None, min_examples=2)


@quickly
@given(alpha=st.none() | alphas, clients=st.integers(3, 14), minimum=st.integers(1, 5), seed=st.integers(0, 99))
def test_no_client_mixes_domains_even_when_examples_have_to_move(alpha, clients, minimum, seed):
    examples = data(90, domains=3, seed=seed)
    partition = parts("domain", examples, clients, seed, alpha=alpha, min_examples=minimum)
    homes = [{examples.domains[row] for row in rows} for rows in partition.indices]
    assert all(len(home) == 1 for home in homes)
    assert min(map(len, partition.indices)) >= minimum
    assert set(Counter(home for (home,) in homes).values()) <= {clients // 3, clients // 3 + 1}


def test_the_largest_domains_get_the_clients_left_over():
    homes = ("small",) * 10 + ("big",) * 40 + ("mid",) * 20
    partition = parts("domain", Examples({"text": homes}, domains=homes), 5)
    assert Counter(homes[rows[0]] for rows in partition.indices) == {"big": 2, "mid": 2, "small": 1}
    with pytest.raises(UserError, match=r"partition\.clients: 2 clients.* 3 domains"):
        parts("domain", Examples({"text": homes}, domains=homes), 2)


@pytest.mark.parametrize(
    "body",
    ["[rows[:5], rows[5:9]]", "[rows[:6], rows[5:]]", "[rows]", "[]", "[rows[:5], rows[5:], []]"],
    ids=["loses", "doubles", "few", "none", "many"],
)
def test_an_own_partitioner_that_breaks_the_contract_is_refused(tmp_path, body):
    file = tmp_path / "own.py"
    file.write_text(f"import numpy as np\ndef deal(examples, clients, generator):\n    rows = np.arange(10)\n    return {body}\n")
    with pytest.raises(UserError, match=r"partition\.name: .*own\.py:deal"):
        parts(f"{file}:deal", data(10), 2)


def test_the_table_tells_each_client_and_how_far_clients_are_from_the_whole():
    labels = np.array([0, 0, 0, 1, 1, 1])
    examples = Examples({"text": [""] * 6}, labels, ("no", "yes"))
    header, rows, measures = table(Partition((np.arange(3), np.arange(3, 6)), ("0", "1")), examples)
    assert header == ["client", "examples", "no", "yes", "largest share"]
    assert rows == [["0", "3", "3", "0", "1.00"], ["1", "3", "0", "3", "1.00"]]
    assert measures["mean_total_variation"] == 0.5
    assert table(Partition((np.array([0, 3]), np.array([1, 2, 4, 5])), ("0", "1")), examples)[2]["mean_total_variation"] == 0
    assert (measures["smallest_client"], measures["largest_client"]) == (3, 3)


def test_the_table_of_many_classes_names_the_largest():
    examples = Examples(
        {"text": [""] * 20}, np.array([4] * 6 + [13] * 5 + [2] * 4 + [0] * 3 + [1] * 2), tuple(f"c{label}" for label in range(14))
    )
    header, rows, _ = table(Partition((np.arange(20),), ("0",)), examples)
    assert header == ["client", "examples", "classes", "largest share"]
    assert rows == [["0", "20", "c4 6, c13 5, c2 4, 2 more", "0.30"]]


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (10, 2), (20, 77), (1000, 10)])
def test_a_picture_of_any_size_and_with_any_name_is_drawn_without_a_warning(tmp_path: Path, clients, classes):
    from matplotlib.image import imread

    counts = np.random.default_rng(0).integers(0, 9, (clients, classes))
    labels = ["$x", "日本", "two\nlines", "a name that goes on and on and on and on", *map(str, range(4, classes))][:classes]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(counts, labels, [f"${client}^$" for client in range(clients)], tmp_path / "partition.png")
    picture = imread(tmp_path / "partition.png")
    assert max(picture.shape) < 4000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20
