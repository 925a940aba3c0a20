"""Convolutions with fewer multiplications: the same numbers, to rounding that is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.program.compiler import default_options
from lowrank_jax.tuning.experimental.winograd import MOST_TAPS, OUTPUTS, transforms, winograd

pytestmark = pytest.mark.slow

cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the step is the convolution itself on a GPU or TPU"
)
OPTIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def random(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def direct(x, kernel, strides=(1, 1), padding="SAME", **options):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **OPTIONS, **options)


def reduced(x, kernel, strides=(1, 1), padding="SAME", **options):
    return winograd(x, kernel, strides, padding, **OPTIONS, **options)


def convolutions(*args, **options):
    return str(
        jax.make_jaxpr(lambda x, kernel: reduced(x, kernel, *args[2:], **options))(*args[:2])
    ).count("conv_gen")


@pytest.mark.parametrize("taps", range(2, MOST_TAPS + 1))
def test_the_transforms_give_a_filter_to_the_precision_of_float64(taps):
    outward, own, inward = transforms(taps)
    x, w = (
        np.random.default_rng(i).standard_normal(n)
        for i, n in enumerate((OUTPUTS + taps - 1, taps))
    )
    assert own.shape == (len(x), taps) and outward.shape == (
        OUTPUTS,
        len(x),
    )  # so many products, not OUTPUTS * taps
    np.testing.assert_allclose(
        outward @ ((own @ w) * (inward @ x)), np.convolve(x, w[::-1], "valid"), atol=1e-13
    )


@cpu
@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2),
    st.tuples(st.integers(6, 11), st.integers(6, 11)),
    st.booleans(),
)
def test_any_kernel_gives_the_convolution(size, strides, dilation, padding, extent, compiled):
    x, kernel = random(0, 2, *extent, 3), random(1, *size, 3, 4)
    if any(
        n + sum(p) < (k - 1) * d + 1
        for n, p, k, d in zip(extent, padding, size, dilation, strict=True)
    ):
        return  # no output at all
    run = lambda step: lambda x, kernel: step(x, kernel, strides, padding, rhs_dilation=dilation)  # noqa: E731
    found = (jax.jit(run(reduced)) if compiled else run(reduced))(x, kernel)
    # Up to 108 products of order one, whose sums a transform multiplies by up to 21 and divides
    # again.
    np.testing.assert_allclose(found, run(direct)(x, kernel), atol=3e-4)


@cpu
@pytest.mark.parametrize("size", [(3, 1), (1, 5), (3, 3), (5, 5)])
def test_the_error_is_a_few_times_that_of_the_convolution(size):
    x, kernel = random(0, 4, 16, 16, 64), random(1, *size, 64, 8) / 8
    # The sums of float64, by NumPy, as JAX computes in float32 here.
    wide = np.pad(np.asarray(x, np.float64), [(0, 0), *((k // 2, k // 2) for k in size), (0, 0)])
    taps = [(i, j) for i in range(size[0]) for j in range(size[1])]
    exact = sum(
        wide[:, i : i + 16, j : j + 16] @ np.asarray(kernel[i, j], np.float64) for i, j in taps
    )
    one, two = (
        np.sqrt(np.mean((np.asarray(run(x, kernel)) - exact) ** 2)) for run in (reduced, direct)
    )
    assert one < 4 * two  # measured: 2.2 to 3.1 times


@cpu
def test_three_taps_take_half_of_the_products_and_five_two_fifths():
    x = random(0, 1, 8, 8, 4)
    for size, products in (
        ((3, 1), 6),
        ((1, 5), 8),
        ((3, 3), 6),
        ((1, 1), 1),
        ((7, 1), 1),
        ((7, 3), 6),
    ):
        assert convolutions(x, random(1, *size, 4, 4)) == products


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", {}),
        ("float16", {}),
        ("float32", {"feature_group_count": 2}),
        ("float32", {"lhs_dilation": (2, 1), "padding": [(1, 1), (1, 1)]}),
        ("float32", {"rhs_dilation": (2, 2)}),
        ("float32", {"strides": (2, 2)}),
    ],
)
def test_what_it_is_not_for_is_the_convolution_itself(dtype, options):
    x = random(0, 1, 9, 9, 4, dtype=dtype)
    kernel = random(1, 3, 3, 4 // options.get("feature_group_count", 1), 4, dtype=dtype)
    assert convolutions(x, kernel, **options) == 1
    np.testing.assert_array_equal(
        *(np.asarray(run(x, kernel, **options), "float32") for run in (reduced, direct))
    )


@cpu
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_few_rows_and_no_images(images, rows):
    x, kernel = random(0, images, rows, 3, 2), random(1, 3, 1, 2, 3)
    np.testing.assert_allclose(reduced(x, kernel), direct(x, kernel), atol=1e-5)


@cpu
def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, kernel = random(0, 1, 8, 8, 16, dtype="float64"), random(1, 3, 1, 16, 4, dtype="float64")
        found = reduced(x, kernel)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, direct(x, kernel), atol=1e-12)


@cpu
def test_no_number_stays_within_its_tile():
    x = random(0, 1, 16, 4, 2).at[0, 0, 0, 0].set(jnp.nan)
    found = np.isnan(reduced(x, random(1, 3, 1, 2, 2)))
    assert found[0, :2, 0].all() and not found[0, OUTPUTS:].any() and not found[:, :, 1:].any()


@cpu
def test_kernels_are_not_transformed_before_their_inputs_are_there():
    def held(layers):
        kernels = [random(i, 3, 3, 64, 64) for i in range(layers)]
        chain = lambda x, kernels: [x := reduced(x, kernel) for kernel in kernels][-1]  # noqa: E731
        options = default_options()
        program = (
            jax.jit(chain, compiler_options=options)
            .lower(random(0, 1, 8, 8, 64), kernels)
            .compile()
        )
        return program.memory_analysis().temp_size_in_bytes

    assert held(12) < 2 * held(3)
