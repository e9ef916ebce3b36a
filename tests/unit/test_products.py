"""Products of factors against dense matrices, in float64: what is never formed is never wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.products import Product, leading, relative_error

sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 2**32))


def drawn(d_out, d_in, ranks, seed):
    generator = np.random.default_rng(seed)
    return [Product.of(generator.normal(size=(d_out, r)), generator.normal(size=(r, d_in)), generator.uniform(0.1, 3)) for r in ranks]


@given(sizes)
def test_a_sum_is_the_dense_sum(drawing):
    products = drawn(*drawing)
    np.testing.assert_allclose(Product.sum(products).dense(), sum(p.dense() for p in products), atol=1e-12)


@given(sizes)
def test_norms_and_inner_products_are_the_dense_ones(drawing):
    products = drawn(*drawing)
    first, last = products[0], products[-1]
    assert first.norm() == pytest.approx(np.linalg.norm(first.dense()), rel=1e-12)
    assert first.inner(last) == pytest.approx(float((first.dense() * last.dense()).sum()), rel=1e-9, abs=1e-11)


@given(sizes)
@settings(max_examples=50)
def test_the_thin_svd_is_the_dense_svd(drawing):
    whole = Product.sum(drawn(*drawing))
    U, S, Vt = whole.svd()
    dense = np.linalg.svd(whole.dense(), compute_uv=False)[: len(S)]
    np.testing.assert_allclose(S[: len(dense)], dense, atol=1e-12 * max(1.0, dense.max()))
    np.testing.assert_allclose((U * S) @ Vt, whole.dense(), atol=1e-11)
    np.testing.assert_allclose(U.T @ U, np.eye(len(S)), atol=1e-12)


@given(sizes, st.integers(1, 6))
@settings(max_examples=50)
def test_truncation_is_the_best_of_its_rank(drawing, r):
    whole = Product.sum(drawn(*drawing))
    cut = whole.truncated(r)
    s = np.linalg.svd(whole.dense(), compute_uv=False)
    assert cut.rank <= r
    np.testing.assert_allclose(cut.norm() ** 2, (s[:r] ** 2).sum(), rtol=1e-9)
    np.testing.assert_allclose((whole - cut).norm(), np.sqrt((s[r:] ** 2).sum()), atol=1e-7)


def test_signs_of_the_svd_are_fixed():
    (product,) = drawn(6, 5, [3], 0)
    turned = Product(-product.left, -product.right)
    for ours, theirs in zip(product.svd(), turned.svd(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_difference_of_equals_is_zero_to_the_last_digits():
    (product,) = drawn(7, 6, [3], 1)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    same = Product(product.left @ rotation, rotation.T @ product.right)
    assert relative_error(same, product) < 1e-14


def test_relative_error_of_nothing():
    zero = Product(np.zeros((3, 1)), np.zeros((1, 2)))
    one = Product(np.ones((3, 1)), np.ones((1, 2)))
    assert relative_error(zero, zero) == 0.0
    assert relative_error(one, zero) == float("inf")
    assert relative_error(zero, one) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(200, 120), (120, 200), (20, 12)])
@pytest.mark.parametrize("fall", [3.0, 60.0])
def test_the_leading_singular_triples_are_those_of_the_svd(shape, fall):
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((d, min(shape))))[0] for d in shape)
    S = np.exp(-np.arange(min(shape)) / fall)
    u, s, vt = leading((U * S) @ V.T, 4)
    np.testing.assert_allclose(s, S[:4], atol=1e-8)
    np.testing.assert_allclose((u * s) @ vt, (U[:, :4] * S[:4]) @ V[:, :4].T, atol=1e-5)
