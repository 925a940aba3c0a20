"""Every scheme is the best approximation of its rank, and costs what it says."""

import math
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.factorization import forms
from lowrank_jax.factorization.axes import own_letters
from lowrank_jax.factorization.factors import dense_shape, factor_keys, is_factors, read_factors

LAYOUTS = {
    "HWIO": (3, 2, 4, 6),
    "OIHW": (6, 4, 2, 3),
    "WIO": (3, 4, 6),
    "DHWIO": (2, 3, 2, 2, 4),
    "IO": (8, 6),
    "OI": (6, 8),
    "IPO": (8, 2, 3),
    "JIO": (2, 4, 6),
    "POI": (2, 3, 8),
    "JIPO": (2, 4, 2, 3),
}


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    "name, keys, text",
    [
        ("mine", ("conv1", "conv_two"), "the key 'conv1' of the form 'mine' is not allowed"),
        ("mine", ("One", "two"), "the key 'One' of the form 'mine' is not allowed"),
        ("spatial", ("one", "two"), "would replace 'spatial' of Channel"),
        ("mine", ("vertical", "horizontal"), "would replace 'vertical' of Separable"),
    ],
)
def test_a_scheme_that_trees_would_take_for_another_is_refused(name, keys, text):
    known = dict(forms.FORMS)
    form = forms.Form(keys=keys, split=lambda spatial: (spatial, ""))
    with pytest.raises(ValueError, match=text):
        type("Own", (lr.Separable,), {}, forms={name: form})
    assert known == forms.FORMS


@st.composite
def schemes(draw):
    axes = draw(st.sampled_from(list(LAYOUTS)))
    shape, spatial = LAYOUTS[axes], "W" in axes
    first = draw(st.sampled_from([name for name, f in forms.FORMS.items() if f.spatial == spatial]))
    groups = draw(st.sampled_from([1, 2]))
    limit = lr.max_rank(shape, groups, axes, first)
    return forms.SCHEMES[first](draw(st.integers(1, limit)), groups, axes, first)


def matrices(kernel, scheme):
    """The matrix of each group, in float64, written without the library's layouts."""
    axes, shape = scheme.axes, kernel.shape
    rows = own_letters(axes, scheme.first, 0)
    columns = [x for x in axes if x not in rows and x not in "OPQR"]
    outputs = [x for x in axes if x in "OPQR"]
    order = [axes.index(x) for x in [*rows, *columns, *outputs]]
    sizes = dict(zip(axes, shape, strict=True))
    width = math.prod(sizes[x] for x in outputs)
    flat = kernel.astype(np.float64).transpose(order)
    split = flat.reshape(
        math.prod(sizes[x] for x in rows), -1, scheme.groups, width // scheme.groups
    )
    return split.transpose(2, 0, 1, 3).reshape(scheme.groups, split.shape[0], -1)


@settings(max_examples=25)
@given(schemes(), st.integers(0, 99))
def test_factors_are_the_best_of_their_rank_and_multiply_back(scheme, seed):
    kernel = normal(LAYOUTS[scheme.axes], seed)
    first, second = scheme.factor(kernel)
    assert (first.shape, second.shape) == scheme.shapes(kernel.shape)
    assert dense_shape(first.shape, second.shape, scheme.axes) == kernel.shape
    values = np.linalg.svd(matrices(kernel, scheme), compute_uv=False)
    best = math.sqrt((values[:, scheme.rank :] ** 2).sum())
    error = np.linalg.norm(np.float64(lr.merge(first, second, scheme.axes)) - kernel)
    # A float32 SVD errs by tens of rounding errors of the kernel's norm.
    assert abs(error - best) < 1e-5 * np.linalg.norm(kernel)
    found = lr.spectrum(kernel, scheme.groups, scheme.axes, scheme.first)
    np.testing.assert_allclose(found, values, atol=1e-5 * np.linalg.norm(kernel))


@given(schemes())
def test_a_scheme_counts_the_parameters_that_its_factors_have(scheme):
    shape = LAYOUTS[scheme.axes]
    assert scheme.parameters(shape) == sum(map(math.prod, scheme.shapes(shape)))


@settings(max_examples=12)
@given(schemes(), st.sampled_from(["float16", "bfloat16", "float32"]))
def test_factors_are_found_in_a_tree_by_their_keys(scheme, dtype):
    kernel = jnp.asarray(normal(LAYOUTS[scheme.axes]), dtype)
    eager = scheme.factor(kernel)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, jax.jit(scheme.factor)(kernel))
    keys = factor_keys(scheme.first, scheme.axes, kernel.ndim)
    node = dict(zip(keys, eager, strict=True))
    assert is_factors(node)
    _, axes, first = read_factors(node, "layer")
    assert axes == scheme.axes
    assert forms.FORMS[first].keys == forms.FORMS[scheme.first].keys


@pytest.mark.parametrize("first", forms.FORMS)
def test_zero_kernels_have_zero_factors(first):
    axes = "HWIO" if forms.FORMS[first].spatial else "IO"
    kernel = np.zeros(LAYOUTS[axes], np.float32)
    factors = forms.SCHEMES[first](2, 1, axes, first).factor(kernel)
    chex.assert_trees_all_equal(lr.merge(*factors, axes), jnp.asarray(kernel))


@pytest.mark.parametrize(
    "scheme, shape, message",
    [
        (lr.Matrix(9), (8, 6), "Matrix: rank 9 is not allowed; give an int from 1 to 6"),
        (
            lr.Matrix(1, 3, "IPO"),
            (8, 2, 3),
            "groups=3 is not allowed; give an int of 1 or more that divides the 2 outputs",
        ),
        (lr.Matrix(1, axes="HWIO"), (3, 3, 4, 4), "axes='HWIO' is not allowed.*'IO'"),
        (lr.Channel(1, axes="IO"), (8, 6), "axes='IO' is not allowed.*'HWIO'"),
        (lr.Channel(1, first="up"), (3, 3, 4, 4), "first='up' is not allowed; give one of"),
        (lr.Matrix(1, axes="IIO"), (2, 4, 6), "name every axis once"),
    ],
)
def test_a_scheme_that_does_not_fit_is_refused_by_name(scheme, shape, message):
    with pytest.raises(ValueError, match=message):
        scheme.factor(normal(shape))


def test_the_scheme_of_ones_own_in_the_docs_is_fitted_planned_and_run():
    text = (Path(__file__).parents[2] / "docs" / "schemes.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(example.partition("class Depth")[2].partition("model")[0].splitlines()) < 20
    scope: dict = {}
    try:
        exec(example, scope)
        small = scope["small"]
        assert set(small["params"]["layers_0"]["kernel"]) == {"depth_DHWIO", "plane_DHWIO"}
        dense = scope["model"].apply(lr.reconstruct(small), scope["x"])
        np.testing.assert_allclose(scope["logits"], dense, atol=1e-5)
        program = lr.trace(scope["model"].apply, scope["variables"], scope["x"])
        assert "depth" in program[0].forms
    finally:
        del forms.FORMS["depth"], forms.SCHEMES["depth"]


def test_forms_that_compute_the_same_are_preferred_in_one_order():
    known = ["vertical", "horizontal", "spatial", "pointwise", "left", "heads"]
    assert list(forms.FORMS)[: len(known)] == known
