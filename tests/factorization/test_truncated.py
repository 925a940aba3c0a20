"""The truncated decomposition is the best of its rank, by whichever route, or the fast route leaves
it to the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization.truncated import SMALL, by_gram, by_svd, truncated

SHAPES = [
    (150, 220),
    (220, 150),
    (160, 160),
]  # wide, tall, square; all above SMALL, so that both routes are open
TYPES = [np.float32, np.float64]


def geometric(size, condition):
    return condition ** (-np.arange(size) / (size - 1))


def levels(size, *values):
    return np.repeat(np.array(values, float), -(-size // len(values)))[:size]


def ending(size, values, last):
    """Values first, then the same one to the end."""
    return np.concatenate([values, np.full(size - len(values), float(last))])


FAMILIES = {
    "flat": lambda n: np.ones(n),
    "condition 10": lambda n: geometric(n, 10),
    "condition 1e3": lambda n: geometric(n, 1e3),
    "condition 1e6": lambda n: geometric(n, 1e6),
    "power 0.5": lambda n: np.arange(1, n + 1) ** -0.5,
    "power 2": lambda n: np.arange(1, n + 1) ** -2.0,
    "two levels": lambda n: levels(n, 1, 0.1),
    "two far levels": lambda n: levels(n, 1, 1e-5),
    "spike": lambda n: ending(n, [10], 1),
    "far spike": lambda n: ending(n, [1e3], 1),
    "clusters": lambda n: levels(n, 1, 0.5, 0.25, 0.125) * (1 + 1e-7 * np.arange(n)[::-1]),
    "rank 20": lambda n: ending(n, np.linspace(2, 1, 20), 0),
    "zeros": lambda n: np.zeros(n),
}
EASY = ("flat", "condition 10", "power 0.5", "two levels", "spike", "clusters")


def times(left, right):
    """A product in float64, by the library of the routes: the threads of NumPy's own copy would
    hold the cores."""
    return scipy.linalg.blas.dgemm(1.0, left, right)


@functools.cache
def matrix(family, shape, dtype, seed=0):
    """A read-only matrix of given singular values between random bases, and its own singular values
    in float64."""
    rng, side = np.random.default_rng(seed), min(shape)
    u, v = (
        scipy.linalg.qr(rng.standard_normal((size, side)), mode="economic")[0] for size in shape
    )
    return known(np.ascontiguousarray(times(u * FAMILIES[family](side), v.T), dtype))


def known(made):
    made.setflags(write=False)  # no route may write into what it is given
    return made, scipy.linalg.svdvals(made.astype(np.float64))


def ranks(shape):
    side = min(shape)
    return [1, side // 4, side // 2, side - 2]


def error(made, pair):
    return np.linalg.norm(times(*pair) - made)


def eps(made):
    return float(np.finfo(made.dtype).eps)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_is_the_least_possible_or_that_of_the_reference(family, shape, dtype):
    made, values = matrix(family, shape, dtype)
    for rank in ranks(shape):
        best, found = np.linalg.norm(values[rank:]), error(made, truncated(made, rank))
        # The promise of the module is 1e-5. Where rounding exceeds what is left out, nothing can do
        # better than the reference, which then is what runs.
        assert found <= best * (1 + 1e-5) or found <= error(made, by_svd(made, rank))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_fast_route_gives_is_far_within_the_promise(family, shape, dtype):
    made, values = matrix(family, shape, dtype)
    for rank in ranks(shape):
        if pair := by_gram(made, rank):
            best = np.linalg.norm(values[rank:])
            # What is lost is second order in an uncertainty of 1e-3; the worst that was seen is
            # under 5e-9.
            assert abs(error(made, pair) - best) <= 1e-6 * best


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", EASY)
def test_the_fast_route_takes_spectra_that_leave_enough_out(family, shape, dtype):
    made, _ = matrix(family, shape, dtype)
    assert by_gram(made, min(shape) // 4) is not None


REFUSED = [
    ("condition 1e6", np.float32, 100),
    ("condition 1e6", np.float64, 148),
    ("two far levels", np.float32, 75),
    ("power 2", np.float32, 148),
    ("far spike", np.float32, 37),
    ("rank 20", np.float32, 20),
    ("rank 20", np.float64, 20),
    ("rank 20", np.float64, 60),
    ("zeros", np.float32, 1),
    ("zeros", np.float64, 75),
]


@pytest.mark.parametrize("family, dtype, rank", REFUSED)
def test_the_fast_route_leaves_to_the_reference_what_squaring_loses(family, dtype, rank):
    made, _ = matrix(family, (150, 220), dtype)
    assert by_gram(made, rank) is None
    np.testing.assert_array_equal(truncated(made, rank)[0], by_svd(made, rank)[0])


@pytest.mark.parametrize("shape", [(SMALL, 400), (400, SMALL), (1, 300), (5, 5)])
def test_small_sides_are_left_to_the_reference(shape):
    assert by_gram(np.random.default_rng(0).standard_normal(shape), 1) is None


@pytest.mark.parametrize("dtype", TYPES)
def test_the_identity_keeps_what_its_rank_says(dtype):
    made = np.eye(150, dtype=dtype)
    for rank in (1, 75, 149, 150):
        # Any basis is right; the error is the root of how many are left out, with a few roundings
        # of each.
        found = error(made, truncated(made, rank))
        np.testing.assert_allclose(
            found, np.sqrt(150 - rank), rtol=1e-5, atol=50 * eps(made) * np.sqrt(150)
        )


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_the_matrix_again(family, dtype):
    made, values = matrix(family, (150, 220), dtype)
    # Rounding errors of a decomposition and a product of these sizes, relative to the largest
    # singular value.
    assert error(made, truncated(made, 150)) <= 50 * eps(made) * np.linalg.norm(values)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", EASY)
def test_factors_are_balanced_and_orthogonal(family, shape, dtype):
    made, values = matrix(family, shape, dtype)
    rank = min(shape) // 4
    left, right = (np.asarray(factor, np.float64) for factor in truncated(made, rank))
    # A component is to a few hundred roundings as long on one side as on the other, its square the
    # singular value.
    np.testing.assert_allclose(np.sum(left**2, 0), np.sum(right**2, 1), rtol=200 * eps(made))
    # Between components, and of the values themselves, the Gram matrix rounds s_1^2; over the
    # smaller value kept.
    limit = 200 * eps(made) * values[0] ** 2 / values[rank - 1]
    for product in (times(left.T, left), times(right, right.T)):
        squares = np.diag(product)
        np.testing.assert_allclose(product, np.diag(squares), atol=limit)
        np.testing.assert_allclose(np.sort(squares)[::-1], values[:rank], atol=limit)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_both_routes_and_the_traced_one_give_the_same_product(dtype, shape):
    made, values = matrix("two levels", shape, dtype)
    rank = min(shape) // 2  # between the levels, where the best product is the only one
    with jax.enable_x64(dtype == np.float64):
        traced = jax.jit(truncated, static_argnums=1)(jnp.asarray(made), rank)
        assert traced[0].dtype == dtype
    products = [times(*pair) for pair in (traced, by_gram(made, rank), by_svd(made, rank))]
    for product in products[1:]:
        # The gap between the levels is nearly s_1, so that each product is exact to its own
        # roundings.
        np.testing.assert_allclose(product, products[0], atol=100 * eps(made) * values[0])


@pytest.mark.parametrize("family", ["power 0.5", "condition 1e6"])
def test_a_stack_is_factored_matrix_by_matrix(family):
    stack = np.stack(
        [matrix(family, (150, 220), np.float32, seed)[0] for seed in range(4)]
    ).reshape(2, 2, 150, 220)
    left, right = truncated(stack, 40)
    assert left.shape == (2, 2, 150, 40) and right.shape == (2, 2, 40, 220)
    for index in np.ndindex(2, 2):
        for one, many in zip(truncated(stack[index], 40), (left[index], right[index]), strict=True):
            np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_in_memory_does_not_matter(shape, dtype):
    made, values = matrix("power 0.5", shape, dtype)
    spread = np.zeros((2 * shape[0], 2 * shape[1]), dtype)[::2, ::2]
    spread[:] = made
    product = times(*by_gram(made, 40))
    for other in (np.asfortranarray(made), spread):
        # The same sums in another order: roundings of the Gram matrix over the distance of the
        # values next to the cut.
        limit = 20 * eps(made) * values[0] ** 2 / (values[39] ** 2 - values[40] ** 2) * values[0]
        np.testing.assert_allclose(times(*by_gram(other, 40)), product, atol=limit)


def test_the_factors_of_the_transpose_are_the_transposed_factors():
    made, _ = matrix("power 0.5", (150, 220), np.float32)
    (left, right), (below, above) = truncated(made, 30), truncated(made.T, 30)
    np.testing.assert_array_equal(left, above.T)
    np.testing.assert_array_equal(right, below.T)


def test_the_result_is_the_same_every_time():
    made, _ = matrix("power 0.5", (160, 160), np.float32)
    for one, two in zip(truncated(made, 30), truncated(made, 30), strict=True):
        np.testing.assert_array_equal(one, two)


@settings(max_examples=15)
@given(st.data())
def test_any_decaying_spectrum_is_cut_as_well_as_can_be(data):
    shape = tuple(data.draw(st.integers(SMALL + 1, 200)) for _ in range(2))
    rank, seed = data.draw(st.integers(1, min(shape))), data.draw(st.integers(0, 99))
    decay, scale = data.draw(st.floats(0, 12)), 10.0 ** data.draw(st.integers(-6, 6))
    rng = np.random.default_rng(seed)
    rows = np.exp(-decay * rng.random(shape[0]))[:, None]  # no spectrum that anyone chose
    made, values = known(np.float32(scale) * (rows * rng.standard_normal(shape)).astype(np.float32))
    best, found = np.linalg.norm(values[rank:]), error(made, truncated(made, rank))
    assert found <= best * (1 + 1e-5) or found <= error(
        made, by_svd(made, rank)
    )  # the promise, or the reference's error
