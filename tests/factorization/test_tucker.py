"""Three factors of a kernel: no worse than the HOSVD, and exact where three factors can be."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.factorization.factors import is_factors, shape_of
from lowrank_jax.factorization.merging import product

LAYOUTS = {"HWIO": (3, 2, 4, 6), "OIHW": (6, 4, 2, 3), "WIO": (3, 4, 6), "DHWIO": (2, 3, 2, 2, 4)}


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@st.composite
def schemes(draw):
    axes = draw(st.sampled_from(list(LAYOUTS)))
    groups, shape = draw(st.sampled_from([1, 2])), LAYOUTS[axes]
    rank, inner = (
        draw(st.integers(1, lr.max_rank(shape, groups, axes, first)))
        for first in ("pointwise", "spatial")
    )
    taps = math.prod(size for letter, size in zip(axes, shape, strict=True) if letter not in "IO")
    return lr.Tucker(min(rank, taps * inner), groups, axes, inner=min(inner, taps * rank))


def unfolded(kernel, axes):
    """A kernel in float64 as (inputs, taps, outputs)."""
    order = [axes.index(x) for x in ["I", *(x for x in axes if x not in "IO"), "O"]]
    moved = np.asarray(kernel, np.float64).transpose(order)
    return moved.reshape(len(moved), -1, moved.shape[-1])


def product_of(scheme, factors):
    """The tensor (inputs, taps, outputs) of each group that three factors stand for."""
    parts = [unfolded(factor, scheme.axes) for factor in factors]
    first, core, last = (np.split(part, scheme.groups, axis=2) for part in parts)
    return [np.einsum("cxk,ktl,lyn->ctn", *group) for group in zip(first, core, last, strict=True)]


def groups_of(kernel, scheme):
    return np.split(unfolded(kernel, scheme.axes), scheme.groups, axis=2)


def hosvd(tensor, rank, inner):
    """Squared error of the truncated HOSVD, and what each of its two subspaces leaves out."""
    inputs, s, _ = np.linalg.svd(tensor.reshape(len(tensor), -1), full_matrices=False)
    outputs, t, _ = np.linalg.svd(tensor.reshape(-1, tensor.shape[2]).T, full_matrices=False)
    core = np.einsum("ctn,ck,nl->ktl", tensor, inputs[:, :rank], outputs[:, :inner])
    left_out = np.sum(s[rank:] ** 2), np.sum(t[inner:] ** 2)
    return np.array([np.sum(tensor**2) - np.sum(core**2), *left_out])


@settings(max_examples=25)
@given(schemes(), st.integers(0, 99))
def test_the_error_is_within_the_bounds_of_both_channel_schemes_and_of_the_hosvd(scheme, seed):
    kernel = normal(LAYOUTS[scheme.axes], seed)
    factors = scheme.factor(kernel)
    assert tuple(x.shape for x in factors) == scheme.shapes(kernel.shape)
    assert scheme.parameters(kernel.shape) == sum(x.size for x in factors)
    tensors = groups_of(kernel, scheme)
    error = gap(product_of(scheme, factors), tensors) ** 2
    best, *left_out = sum(hosvd(tensor, *scheme.ranks) for tensor in tensors)
    rounding = 1e-5 * np.sum(kernel**2)
    assert max(left_out) - rounding <= error <= min(sum(left_out), best) + rounding


def gap(found, wanted):
    return np.linalg.norm(np.stack(found) - np.stack(wanted))


@pytest.mark.parametrize("axes", ["OIHW", "WIO"])
def test_a_kernel_of_such_factors_is_found_again(axes):
    scheme = lr.Tucker(2, 2, axes, inner=1)
    node = scheme.node([jnp.asarray(normal(shape)) for shape in scheme.shapes(LAYOUTS[axes])])
    kernel = np.asarray(product(node, "layer"))
    wanted = groups_of(kernel, scheme)
    found = product_of(scheme, scheme.factor(kernel))
    assert gap(found, wanted) < 1e-5 * np.linalg.norm(kernel)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_node_in_a_tree_stands_for_the_kernel(dtype):
    scheme, kernel = lr.Tucker(2, 2, "OIHW", inner=3), jnp.ones((6, 4, 2, 3), dtype)
    node = scheme.node(scheme.factor(kernel))
    assert is_factors(node) and shape_of(node) == kernel.shape
    chex.assert_trees_all_equal_shapes_and_dtypes(product(node, "layer"), kernel)
    np.testing.assert_allclose(np.float32(product(node, "layer")), 1, rtol=1e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(node)} == {kernel.dtype}


def test_under_jit_and_in_a_stack_the_kernels_are_the_same():
    scheme, stack = lr.Tucker(2, 2, inner=3), normal((2, 3, 3, 4, 8))
    alone = [product_of(scheme, scheme.factor(kernel)) for kernel in stack]
    for factor in (scheme.factor, jax.jit(scheme.factor)):
        slices = zip(*factor(stack), strict=True)
        np.testing.assert_allclose([product_of(scheme, own) for own in slices], alone, atol=1e-4)


def test_the_derivative_of_the_kernel_is_that_of_finite_differences():
    scheme, kernel, change = lr.Tucker(2, inner=3), normal((3, 3, 4, 6)), normal((3, 3, 4, 6), 1)

    def along(t):
        node = scheme.node(scheme.factor(kernel + t * change))
        return jnp.sum(jnp.cos(product(node, "layer")))

    both, step = jax.jit(lambda t: jax.jvp(along, (t,), (1.0,))), 1e-2
    slope = (both(step)[0] - both(-step)[0]) / (2 * step)
    assert both(0.0)[1] == pytest.approx(float(slope), rel=2e-2)


def test_a_zero_kernel_has_zero_factors():
    factors = lr.Tucker(2, inner=3).factor(np.zeros((3, 3, 4, 6), np.float32))
    assert all(not np.any(factor) for factor in factors)


@pytest.mark.parametrize(
    "scheme, message",
    [
        (lr.Tucker(5, inner=1), "Tucker: rank 5 is not allowed; give an int from 1 to 4"),
        (lr.Tucker(4, inner=7), "Tucker, inner: rank 7 is not allowed; give an int from 1 to 6"),
        (lr.Tucker(1, inner=0), "Tucker, inner: rank 0 is not allowed"),
        (
            lr.Tucker(1, 5, inner=1),
            "groups=5 is not allowed; give an int of 1 or more that divides the 6 outputs",
        ),
        (lr.Tucker(1, axes="IO", inner=1), "axes='IO' is not allowed.*'HWIO'"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_by_name(scheme, message):
    with pytest.raises(ValueError, match=message):
        scheme.factor(normal((3, 3, 4, 6)))


def test_a_rank_that_the_other_one_cannot_fill_is_refused():
    with pytest.raises(ValueError, match=r"rank 4 is not allowed beside inner=1; .*from 1 to 3"):
        lr.Tucker(4, axes="WIO", inner=1).factor(normal((3, 4, 6)))
    with pytest.raises(ValueError, match="inner: rank 4 is not allowed; give an int from 1 to 3"):
        lr.Tucker(1, axes="WIO", inner=4).factor(normal((3, 4, 6)))


def test_the_parameters_are_those_of_the_three_convolutions():
    shape, scheme = (5, 5, 96, 192), lr.Tucker(20, inner=30)
    assert scheme.parameters(shape) == 96 * 20 + 25 * 20 * 30 + 30 * 192
    assert math.prod(scheme.shapes(shape)[1]) == 25 * 20 * 30
