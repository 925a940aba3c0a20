"""Separable is the best approximation of its rank, in every type, shape, group and
transformation."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax import Separable, decompose, max_rank
from lowrank_jax.factorization.forms import FORMS, SCHEMES

few = settings(max_examples=20)
EPS = float(np.finfo(np.float32).eps)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SHAPES = [
    ((3, 3, 2, 4), 1),
    ((2, 3, 2, 6), 3),
    ((4, 2, 1, 4), 2),
    ((1, 3, 3, 4), 1),
    ((3, 1, 2, 4), 2),
    ((1, 1, 1, 1), 1),
]


@st.composite
def cases(draw):
    """A float32 kernel, a number of groups and a rank allowed for them; few shapes, as each is
    compiled."""
    shape, groups = draw(st.sampled_from(SHAPES))
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    kernel = np.float32(scale) * normal(shape, draw(st.integers(0, 999)))
    return kernel, groups, draw(st.integers(1, max_rank(shape, groups)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def factor(kernel, rank, groups=1):
    return Separable(rank, groups).factor(kernel)


@jax.jit
def merge(vertical, horizontal):
    return lr.merge(vertical, horizontal)


def matrices(kernel, groups=1):
    """The matrix of each group, in float64, written without the library."""
    h, w, c, n = kernel.shape
    parts = np.split(np.asarray(kernel, np.float64), groups, axis=-1)
    return np.stack([part.transpose(0, 2, 1, 3).reshape(h * c, w * n // groups) for part in parts])


def product(vertical, horizontal, groups=1):
    """The kernel of the two convolutions in sequence, in float64, written without the library."""
    pairs = zip(np.split(vertical, groups, -1), np.split(horizontal, groups, -1), strict=True)
    terms = [np.einsum("yck,xkn->yxcn", np.float64(v[:, 0]), np.float64(h[0])) for v, h in pairs]
    return np.concatenate(terms, -1)


def error(kernel, factors, groups=1):
    return np.linalg.norm(product(*map(np.asarray, factors), groups) - np.float64(kernel))


def dropped(kernel, rank, groups=1):
    """The root of the sum of the squared singular values beyond the rank, over all groups."""
    return np.sqrt(np.sum(np.linalg.svd(matrices(kernel, groups), compute_uv=False)[:, rank:] ** 2))


def slack(kernel):
    """A float32 SVD and product of these sizes err by a few tens of rounding errors of the kernel's
    norm."""
    return 50 * EPS * np.linalg.norm(kernel) + np.finfo(np.float32).tiny


def best_of_alternating_least_squares(matrix, rank, restarts=4, steps=100):
    """The smallest error that another method finds from random starts, in float64."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(restarts):
        right = rng.standard_normal((rank, matrix.shape[1]))
        for _ in range(steps):
            left = matrix @ np.linalg.pinv(right)
            right = np.linalg.pinv(left) @ matrix
        errors.append(np.linalg.norm(matrix - left @ right))
    return min(errors)


@few
@given(cases())
def test_shapes_are_those_of_a_vertical_and_a_horizontal_convolution(case):
    kernel, groups, rank = case
    h, w, c, n = kernel.shape
    vertical, horizontal = factor(kernel, rank, groups)
    chex.assert_shape(vertical, (h, 1, c, groups * rank))
    chex.assert_shape(horizontal, (1, w, rank, n))


@few
@given(cases())
def test_full_rank_reproduces_the_kernel(case):
    kernel, groups, _ = case
    factors = factor(kernel, max_rank(kernel.shape, groups), groups)
    assert error(kernel, factors, groups) <= slack(kernel)
    assert np.linalg.norm(merge(*factors) - kernel) <= slack(kernel)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "shape, groups", [((3, 3, 4, 8), 1), ((3, 5, 2, 6), 2), ((1, 4, 3, 5), 1), ((4, 1, 1, 4), 4)]
)
def test_full_rank_reproduces_the_kernel_in_every_storage_type(dtype, shape, groups):
    with jax.enable_x64(dtype == "float64"):
        kernel = jnp.asarray(normal(shape), dtype)
        factors = Separable(max_rank(shape, groups), groups).factor(kernel)
        chex.assert_type([*factors, lr.merge(*factors)], jnp.dtype(dtype))
        # Each factor and their product are rounded once: 3 roundings, each half an eps, of terms
        # that cancel.
        limit = (
            50 * float(jnp.finfo(dtype).eps)
            if dtype in ("float32", "float64")
            else 4 * float(jnp.finfo(dtype).eps)
        )
        wide = np.asarray(kernel, np.float64)
        gap = np.linalg.norm(np.asarray(lr.merge(*factors), np.float64) - wide)
        assert gap <= limit * np.linalg.norm(wide)


@few
@given(cases())
def test_the_error_is_the_root_of_the_squared_singular_values_left_out(case):
    kernel, groups, rank = case
    found = error(kernel, factor(kernel, rank, groups), groups)
    np.testing.assert_allclose(found, dropped(kernel, rank, groups), atol=slack(kernel))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_no_other_factors_of_the_rank_do_better(rank):
    kernel = normal((3, 3, 3, 4), seed=rank)
    found = error(kernel, Separable(rank).factor(kernel))
    other = best_of_alternating_least_squares(matrices(kernel)[0], rank)
    assert found <= other + slack(kernel)
    assert (
        other <= 1.01 * found
    )  # the search is a fair rival: a worse one would make the test above empty


@few
@given(cases())
def test_the_two_factors_of_each_group_have_the_same_norm(case):
    kernel, groups, rank = case
    vertical, horizontal = factor(kernel, rank, groups)
    v = np.linalg.norm(np.reshape(vertical, (-1, groups, rank)), axis=(0, 2))
    h = np.linalg.norm(
        np.reshape(horizontal, (-1, groups, kernel.shape[-1] // groups)), axis=(0, 2)
    )
    # The columns of U and the rows of Q^T have norm 1 up to a few tens of roundings.
    np.testing.assert_allclose(v, h, rtol=50 * EPS)


@few
@given(cases())
def test_the_error_never_grows_with_the_rank(case):
    kernel, groups, _ = case
    ranks = range(1, max_rank(kernel.shape, groups) + 1)
    errors = [error(kernel, factor(kernel, rank, groups), groups) for rank in ranks]
    assert np.all(np.diff(errors) <= slack(kernel))


class TestVariants(chex.TestCase):
    """A class only because `chex.variants` asks for one."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_factor_and_merge_are_the_same_compiled_or_not(self):
        kernel = jnp.asarray(normal((3, 5, 4, 6)))
        merged = self.variant(lambda x: lr.merge(*Separable(3, groups=2).factor(x)))(kernel)
        expected = product(*map(np.asarray, Separable(3, groups=2).factor(kernel)), 2)
        # Compilation may reorder float32 sums; the entries are of the order of 1.
        np.testing.assert_allclose(merged, expected, atol=50 * EPS)


def low_rank(kernel):
    return lr.merge(*Separable(2).factor(kernel))


@pytest.mark.parametrize("transform", [jax.vmap, lambda f: f, jax.jit])
def test_a_stack_of_kernels_is_decomposed_slice_by_slice(transform):
    stack = jnp.asarray(normal((3, 3, 2, 4, 5)))
    vertical, horizontal = transform(Separable(2).factor)(stack)
    chex.assert_shape([vertical, horizontal], [(3, 3, 1, 4, 2), (3, 1, 2, 2, 5)])
    for index in range(3):
        found, alone = merge(vertical[index], horizontal[index]), low_rank(stack[index])
        np.testing.assert_allclose(
            found, alone, atol=50 * EPS
        )  # as the SVD's sign is free, compare products


def test_a_stack_may_have_several_axes_and_groups():
    stack = normal((2, 3, 2, 4, 2, 6))
    merged = lr.merge(*Separable(1, groups=3).factor(stack))
    for index in np.ndindex(2, 3):
        alone = product(*map(np.asarray, Separable(1, 3).factor(stack[index])), 3)
        np.testing.assert_allclose(merged[index], alone, atol=50 * EPS)  # entries of the order of 1


@few
@given(cases())
def test_every_group_is_decomposed_as_if_it_were_alone(case):
    kernel, groups, rank = case
    merged = merge(*factor(kernel, rank, groups))
    for part, alone in zip(np.split(merged, groups, -1), np.split(kernel, groups, -1), strict=True):
        assert np.linalg.norm(part - alone) <= dropped(alone, rank) + slack(alone)


def test_the_gradient_of_a_stack_is_the_stack_of_gradients():
    stack = jnp.asarray(normal((3, 2, 3, 2, 3)))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(low_rank(x)))))
    batched = jax.jit(jax.vmap(gradient))(stack)
    # Differentiating the SVD divides by gaps between squared singular values, which magnifies
    # rounding about 100x.
    np.testing.assert_allclose(batched, np.stack([gradient(x) for x in stack]), atol=5000 * EPS)


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (1, 1, 1, 1)])
def test_a_zero_kernel_has_zero_factors(shape):
    factors = Separable(1).factor(jnp.zeros(shape))
    chex.assert_trees_all_equal(factors, jax.tree.map(jnp.zeros_like, factors))


@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 6), (3, 3, 1, 1), (1, 1, 1, 1), (5, 1, 1, 3), (1, 5, 3, 1)]
)
def test_degenerate_shapes_are_exact_at_their_full_rank(shape):
    kernel = normal(shape)
    assert error(kernel, Separable(max_rank(shape)).factor(kernel)) <= slack(kernel)


@few
@given(cases(), st.integers(0, 99))
def test_a_rank_deficient_kernel_is_exact_at_its_rank(case, seed):
    kernel, groups, rank = case
    h, w, c, n = kernel.shape
    deficient = product(
        normal((h, 1, c, groups * rank), seed), normal((1, w, rank, n), seed + 1), groups
    )
    deficient = deficient.astype(np.float32)
    assert error(deficient, factor(deficient, rank, groups), groups) <= slack(deficient)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_computed_in_float32_and_rounded_once(dtype):
    kernel = jnp.asarray(normal((3, 3, 8, 8)), dtype)
    wide = Separable(5).factor(kernel.astype(jnp.float32))
    low = Separable(5).factor(kernel)
    chex.assert_trees_all_equal(low, jax.tree.map(lambda x: x.astype(dtype), wide))
    merged = lr.merge(*(x.astype(jnp.float32) for x in low))
    chex.assert_trees_all_equal(lr.merge(*low), merged.astype(dtype))


def test_a_numpy_float64_kernel_is_decomposed_where_jax_has_no_float64():
    kernel = normal((3, 3, 2, 4)).astype(np.float64)
    factors = Separable(6).factor(kernel)
    chex.assert_type([*factors], jnp.float32)
    assert error(kernel, factors) <= slack(kernel)


@pytest.mark.parametrize(
    "rank", [0, -1, 7, True, False, np.True_, 2.5, 2.0, "3", None, [2], np.float32(2)]
)
def test_a_bad_rank_is_refused_with_its_value_and_the_limit(rank):
    with pytest.raises(ValueError, match="1 to 6") as info:
        Separable(rank).factor(jnp.ones((3, 3, 2, 4)))
    assert f"rank {rank!r}" in str(info.value)


def test_a_traced_rank_is_refused():
    with pytest.raises(ValueError, match="1 to 6"):
        jax.jit(lambda rank: Separable(rank).factor(jnp.ones((3, 3, 2, 4))))(2)


@pytest.mark.parametrize("groups", [0, -1, 3])
def test_groups_that_do_not_divide_the_outputs_are_refused(groups):
    with pytest.raises(ValueError, match=f"groups={groups}"):
        Separable(1, groups).factor(jnp.ones((3, 3, 2, 4)))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_ranks(integer):
    kernel = normal((3, 3, 2, 4))
    chex.assert_trees_all_equal(Separable(integer(2)).factor(kernel), Separable(2).factor(kernel))


def test_the_limit_is_the_smaller_side_of_the_matrix_of_a_group():
    assert max_rank((5, 3, 4, 8)) == 20
    assert max_rank((5, 3, 4, 8), groups=2) == 12
    assert max_rank((7, 5, 3, 4, 8), groups=8) == 3  # leading axes are a stack


def weights(layers, ranks):
    """Weights before and after, layers being (kernel shape, groups), from shapes alone."""
    params = {
        f"conv{i}": {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
        for i, (shape, _) in enumerate(layers)
    }
    table = {
        f"conv{i}": Separable(rank, groups)
        for i, (rank, (_, groups)) in enumerate(zip(ranks, layers, strict=True))
    }
    small = jax.eval_shape(lambda tree: decompose(tree, table), params)
    return tuple(
        sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (params, small)
    )


def test_the_authors_ranks_for_vgg16_give_the_weights_they_published():
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    layers = [((3, 3, c, n), 1) for c, n in itertools.pairwise(channels)]
    before, after = weights(layers, [5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320])
    assert f"{before / 1e6:.2f} {after / 1e6:.2f} {before / after:.3f}" == "14.71 5.36 2.745"


def test_the_authors_ranks_for_caffenet_give_the_weights_they_published():
    shapes = [
        (11, 11, 3, 96),
        (5, 5, 48, 256),
        (3, 3, 256, 384),
        (3, 3, 192, 384),
        (3, 3, 192, 256),
    ]
    groups = [1, 2, 1, 2, 2]
    ranks = [
        rank // group for rank, group in zip([8, 40, 60, 100, 200], groups, strict=True)
    ]  # theirs are of a layer
    before, after = weights(list(zip(shapes, groups, strict=True)), ranks)
    assert f"{before / after:.2f}" == "5.00"


LAYOUTS = {
    "HWIO": (3, 5, 4, 6),
    "OIHW": (6, 4, 3, 5),
    "DHWIO": (2, 3, 5, 4, 6),
    "IO": (4, 6),
    "OI": (6, 4),
    "IPO": (4, 2, 3),
    "PJOI": (2, 3, 3, 2),
}


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("axes", LAYOUTS)
def test_the_shapes_foretold_are_those_of_the_factors(axes, first):
    shape, scheme = LAYOUTS[axes], SCHEMES[first](3, 2, axes, first)
    if FORMS[first].spatial != ("W" in axes):
        with pytest.raises(ValueError, match=f"axes='{axes}' is not allowed"):
            scheme.shapes(shape)
        return
    assert scheme.shapes(shape) == tuple(factor.shape for factor in scheme.factor(normal(shape)))
