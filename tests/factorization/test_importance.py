"""Outputs are weighted so that the square of an error is what the error costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax.factorization import importance as module
from lowrank_jax.factorization.importance import SHARE, Importance, block_size, times

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6))
seeds = st.integers(0, 2**31)


def curvature(seed, count, size):
    half = np.random.default_rng(seed).standard_normal((count, size, size + 1))
    return half @ half.mT


def dense(blocks):
    """The matrix of blocks along its diagonal."""
    count, size, _ = blocks.shape
    whole = np.zeros((count * size, count * size))
    for index, block in enumerate(blocks):
        own = slice(index * size, (index + 1) * size)
        whole[own, own] = block
    return whole


@given(seeds, shapes)
def test_the_square_of_a_weighted_error_is_its_cost(seed, shape):
    cost = curvature(seed, *shape)
    kept = SHARE * cost + (1 - SHARE) * cost * np.eye(shape[1])
    importance = Importance.of(cost)
    error = np.random.default_rng(seed).standard_normal((3, importance.outputs))
    expected = np.einsum("in,nm,im->i", error, dense(kept), error)
    squares = np.sum(importance.weighted(error) ** 2, axis=1)
    np.testing.assert_allclose(squares, expected, rtol=1e-5)  # roots of float32
    np.testing.assert_allclose(importance.diagonal, np.diag(dense(kept)), rtol=1e-5)


@given(seeds, shapes)
def test_what_is_weighted_is_restored(seed, shape):
    importance = Importance.of(curvature(seed, *shape))
    values = np.random.default_rng(seed).standard_normal((2, 3, importance.outputs))
    again = importance.restored(importance.weighted(values))
    # The diagonal bounds the condition number of a normalised block by 10 b.
    np.testing.assert_allclose(again, values, rtol=1e-6, atol=1e-6)


@given(seeds, shapes)
def test_blocks_are_the_matrix_along_whose_diagonal_they_lie(seed, shape):
    blocks = curvature(seed, *shape)
    values = np.random.default_rng(seed).standard_normal((5, shape[0] * shape[1]))
    np.testing.assert_allclose(times(values, blocks), values @ dense(blocks), atol=1e-9)
    device = jax.jit(times)(jnp.asarray(values, jnp.float32), jnp.asarray(blocks, jnp.float32))
    np.testing.assert_allclose(device, values @ dense(blocks), atol=1e-3, rtol=1e-4)


@given(seeds, st.sampled_from([(1, 6), (2, 3), (3, 4), (6, 1)]), st.sampled_from([1, 2, 3, 6]))
def test_within_groups_errors_of_two_groups_do_not_meet(seed, shape, groups):
    importance = Importance.of(curvature(seed, *shape))
    if importance.outputs % groups:
        return
    inside = importance.within(groups)
    size = importance.outputs // groups
    whole, cut = (dense(own.roots @ own.roots.mT) for own in (importance, inside))
    group = np.arange(importance.outputs) // size
    block = np.arange(importance.outputs) // inside.roots.shape[1]
    same = block[:, None] == block
    assert not (same & (group[:, None] != group)).any()
    np.testing.assert_allclose(cut, whole * same, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    assert sum(part.outputs for part in importance.of_groups(groups)) == importance.outputs


@pytest.mark.parametrize("cost", [0.0, 1e-30, 1e30])
def test_all_outputs_count_alike_where_all_cost_alike(cost):
    roots = Importance.of(np.full((3, 1, 1), cost)).roots
    np.testing.assert_allclose(roots / roots[0], np.ones((3, 1, 1)))
    assert np.isfinite(roots).all() and (roots > 0).all()


def test_blocks_are_the_largest_that_divide_the_outputs(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 10)
    assert [block_size(outputs) for outputs in (1, 7, 10, 12, 13)] == [1, 7, 10, 6, 1]
