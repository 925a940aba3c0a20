"""Factors tell by their keys and shapes alone which kernel they stand for."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax import Separable, merge, reconstruct, trace
from lowrank_jax.factorization.factors import (
    check_floating,
    dense_shape,
    factor_keys,
    is_factor_key,
    is_factors,
    read_factors,
)
from lowrank_jax.factorization.forms import FORMS, SCHEMES

LAYOUTS = {True: ["WIO", "HWIO", "DHWIO"], False: ["IO", "IPO", "JIO", "JIPO"]}
NARROW = ["int8", "uint8", "int4", "int32", "float8_e4m3fn", "float8_e5m2", "bool"]


@st.composite
def schemes(draw):
    """A scheme of any layout, and the shape of a kernel, or of a stack, that it fits."""
    first = draw(st.sampled_from(sorted(FORMS)))
    layout = draw(st.sampled_from(LAYOUTS[FORMS[first].spatial]))
    axes = "".join(draw(st.permutations(layout)))
    groups, rank = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    sizes = {letter: draw(st.integers(1, 3)) for letter in axes}
    outputs = next(letter for letter in axes if letter in "OP")
    sizes |= {"I": draw(st.integers(2, 3)), outputs: groups * draw(st.integers(2, 3))}
    stack = draw(st.sampled_from([(), (2,)]))
    scheme = SCHEMES[first](rank, groups, axes, first)
    return scheme, (*stack, *(sizes[letter] for letter in axes))


def pair_of(scheme, shape):
    """Factors of a shape, without values."""
    stack = shape[: len(shape) - len(scheme.axes)]
    return [jax.ShapeDtypeStruct((*stack, *own), "float32") for own in scheme.shapes(shape)]


@settings(max_examples=200)
@given(schemes())
def test_a_node_of_factors_tells_layout_order_and_the_kernels_shape(case):
    scheme, shape = case
    one, two = pair_of(scheme, shape)
    keys = factor_keys(scheme.first, scheme.axes, len(shape))
    node = dict(zip(keys, (one, two), strict=True))
    assert is_factors(node) and all(map(is_factor_key, keys))
    pair, axes, first = read_factors(dict(reversed(node.items())), "layer")
    assert pair == (one, two) and factor_keys(first, axes, len(shape)) == keys
    usual = axes == scheme.axes or f"_{scheme.axes}" not in keys[0]
    assert usual and dense_shape(one.shape, two.shape, axes) == shape
    merged = jax.eval_shape(lambda one, two: merge(one, two, axes), one, two)
    assert merged.shape == shape


@settings(max_examples=100)
@given(schemes(), st.data())
def test_factors_of_which_one_axis_has_another_size_are_refused_or_fit_all_the_same(case, data):
    scheme, shape = case
    pair = [list(factor.shape) for factor in pair_of(scheme, shape)]
    index = data.draw(st.integers(0, 1))
    axis = data.draw(st.integers(0, len(shape) - 1))
    pair[index][axis] += 1
    keys = factor_keys(scheme.first, scheme.axes, len(shape))
    node = {key: jax.ShapeDtypeStruct(own, "float32") for key, own in zip(keys, pair, strict=True)}
    with contextlib.suppress(ValueError):  # refused
        (one, two), axes, _ = read_factors(node, "layer")
        merged = jax.eval_shape(lambda one, two: merge(one, two, axes), one, two)
        assert merged.shape == dense_shape(one.shape, two.shape, axes)


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"vertical": np.ones((3, 1, 4, 2))},
        {"vertical": np.ones((3, 1, 4, 2)), "horizontal_second": np.ones((1, 3, 2, 8))},
        {"vertical": np.ones((3, 1, 4, 2)), "vertical_second": np.ones((1, 3, 2, 8))},
        {"vertical_OIHW": np.ones((3, 1, 4, 2)), "horizontal": np.ones((1, 3, 2, 8))},
        {"vertical": np.ones(3), "horizontal": np.ones(3)},
        {"vertical": 0, "horizontal": 0},
        {"vertical": {"kernel": np.ones((3, 1, 4, 2))}, "horizontal": np.ones((1, 3, 2, 8))},
        {1: np.ones((3, 1, 4, 2)), 2: np.ones((1, 3, 2, 8))},
        [np.ones((3, 1, 4, 2)), np.ones((1, 3, 2, 8))],
        np.ones((3, 1, 4, 2)),
    ],
)
def test_other_nodes_are_no_factors(node):
    assert not is_factors(node)


def test_factors_of_integers_are_refused_with_their_path():
    node = {"vertical": np.ones((3, 1, 4, 2), int), "horizontal": np.ones((1, 3, 2, 8))}
    with pytest.raises(ValueError, match="layer: factors of types int64 and float64"):
        read_factors(node, "layer")


def quantised(dtype):
    return {"stage": {"conv": {"kernel": jnp.ones((3, 3, 4, 8), dtype)}}}


def convolve(tree, x):
    kernel = tree["stage"]["conv"]["kernel"].astype(jnp.float32)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_kernels_of_integers_or_of_one_byte_are_refused_alike_everywhere(dtype):
    tree, x = quantised(dtype), jnp.ones((1, 5, 5, 4))
    kernel = tree["stage"]["conv"]["kernel"]
    uses = trace(convolve, tree, x)
    calls = [
        ("stage/conv", lambda: lr.decompose(tree, {"stage/conv": 2})),
        ("stage/conv", lambda: lr.decompose(tree, {"stage/conv": 2}, uses)),
        ("Separable", lambda: Separable(2).factor(kernel)),
        ("spectrum", lambda: lr.spectrum(kernel)),
        ("anywhere", lambda: check_floating(dtype, "anywhere")),
    ]
    for where, call in calls:
        with pytest.raises(ValueError, match=f"^{where}: the kernel has type {dtype}; allowed are"):
            call()
    assert not uses[0].safe and f"has type {dtype}" in uses[0].reason


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_pattern_that_matches_a_quantised_kernel_names_it(dtype):
    with pytest.raises(ValueError, match=f"^stage/conv: the kernel has type {dtype}"):
        lr.decompose(quantised(dtype), {"stage/.*": 2})
    tree = quantised(dtype) | {"float": {"kernel": jnp.ones((3, 3, 4, 8))}}
    small = lr.decompose(tree, {"stage/.*": None, ".*": 2})
    assert small["stage"]["conv"]["kernel"].dtype == dtype
    assert reconstruct(small)["float"]["kernel"].shape == (3, 3, 4, 8)
