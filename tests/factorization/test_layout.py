"""The bijection loses nothing, moves nothing to another group, and keeps the order (tap,
channel)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization.layout import from_matrix, to_matrix

few = settings(max_examples=25)


@st.composite
def cases(draw):
    """A stack, the shape of a kernel, and a number of groups that divides its output channels."""
    stack = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    h, w, c, groups, per_group = (draw(st.integers(1, 4)) for _ in range(5))
    return stack, (h, w, c, groups * per_group), groups


def count(shape):
    """An array in which every entry is a different integer, so that no permutation goes
    unnoticed."""
    return np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.float32).reshape(shape)


@few
@given(cases())
def test_folding_undoes_unfolding(case):
    stack, shape, groups = case
    kernel = count(stack + shape)
    np.testing.assert_array_equal(from_matrix(to_matrix(kernel, groups), shape), kernel)


@few
@given(cases())
def test_unfolding_undoes_folding(case):
    stack, (h, w, c, n), groups = case
    matrix = count((*stack, groups, h * c, w * n // groups))
    np.testing.assert_array_equal(to_matrix(from_matrix(matrix, (h, w, c, n)), groups), matrix)


@few
@given(cases())
def test_the_matrix_holds_the_same_entries_once_so_the_frobenius_norm_is_kept(case):
    stack, shape, groups = case
    kernel = count(stack + shape)
    matrix = to_matrix(kernel, groups)
    np.testing.assert_array_equal(np.sort(np.ravel(matrix)), kernel.ravel())
    norms = [np.sum(np.square(x, dtype=np.float64)) for x in (np.asarray(matrix), kernel)]
    assert norms[0] == norms[1]  # sums of squared integers below 2^53 are exact in any order


@few
@given(cases())
def test_rows_are_vertical_tap_then_input_and_columns_horizontal_tap_then_output(case):
    stack, (h, w, c, n), groups = case
    kernel = count((*stack, h, w, c, n))
    matrix = np.asarray(to_matrix(kernel, groups))
    chex.assert_shape(matrix, (*stack, groups, h * c, w * n // groups))
    per_group = n // groups
    for y, x, i, o in np.ndindex(h, w, c, n):
        column = x * per_group + o % per_group
        np.testing.assert_array_equal(
            matrix[..., o // per_group, y * c + i, column], kernel[..., y, x, i, o]
        )


def test_the_kernel_of_a_vertical_and_of_a_horizontal_convolution_are_the_factors_of_a_matrix():
    vertical, horizontal = count((3, 1, 4, 2)), count((1, 5, 2, 6))
    np.testing.assert_array_equal(to_matrix(vertical)[0], vertical.reshape(12, 2))
    np.testing.assert_array_equal(
        to_matrix(horizontal)[0], horizontal[0].transpose(1, 0, 2).reshape(2, 30)
    )


def test_type_is_kept_and_the_bijection_can_be_jitted_and_vmapped():
    kernels = jnp.asarray(count((2, 3, 5, 4, 6)), jnp.float16)
    unfold = jax.jit(jax.vmap(lambda kernel: to_matrix(kernel, 2)))
    fold = jax.jit(jax.vmap(lambda matrix: from_matrix(matrix, (3, 5, 4, 6))))
    chex.assert_trees_all_equal(unfold(kernels), to_matrix(kernels, 2))
    chex.assert_trees_all_equal_shapes_and_dtypes(fold(unfold(kernels)), kernels)
    chex.assert_trees_all_equal(fold(unfold(kernels)), kernels)
