"""Derivatives of the truncated decomposition: those of the product, and finite everywhere."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import Separable, merge
from lowrank_jax.factorization.differentiable import by_jax
from lowrank_jax.factorization.layout import from_matrix, from_pair

SHAPES = [(4, 5), (5, 3)]
STEP = 1e-5  # central differences keep about 1e-9 of values of the order of 10
MATRICES = {
    "zero": np.zeros((6, 12)),
    "ones": np.ones((6, 12)),
    "identity": np.eye(6, 12),
    "one entry": np.eye(6, 12) * (np.arange(12) == 3),
    "two of each": np.kron(np.eye(3, 6), np.ones((2, 2))),
}


def with_values(m, n, values, seed):
    """A matrix of given singular values between random bases."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((side, side)))[0] for side in (m, n))
    return (u[:, : len(values)] * values) @ v[:, : len(values)].T


def of_product(pair):
    return jnp.sum(jnp.cos(jnp.matmul(*pair)))


def of_norms(pair):
    left, right = pair
    return jnp.sum((left.T @ left) ** 2) + jnp.sum(right**2)


@functools.cache
def gradient(of, rank):
    return jax.jit(jax.value_and_grad(lambda matrix: of(by_jax(matrix, rank))))


@settings(max_examples=20)
@given(
    st.sampled_from(SHAPES), st.sampled_from([of_product, of_norms]), st.integers(0, 99), st.data()
)
def test_the_derivative_is_that_of_finite_differences(shape, of, seed, data):
    """Equal singular values among those kept, and among those left out, are drawn often."""
    size = min(shape)
    rank = data.draw(st.integers(1, size))
    kept = data.draw(st.lists(st.sampled_from([2.0, 3.0]), min_size=rank, max_size=rank))
    others = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=size - rank))
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        matrix, way = with_values(*shape, np.array(kept + others), seed), rng.standard_normal(shape)
        _, found = gradient(of, rank)(matrix)
        after, before = (gradient(of, rank)(matrix + step * way)[0] for step in (STEP, -STEP))
        expected = (after - before) / (2 * STEP)
    np.testing.assert_allclose(np.vdot(found, way), expected, rtol=1e-6, atol=1e-6)


def kernel_of(name, dtype):
    """The kernel (3, 3, 2, 4) whose matrix has the name."""
    whole = from_matrix(jnp.asarray(MATRICES[name])[None], (3, 3, 2, 4))
    return from_pair(whole, "HWIO", "vertical", {"H": 3, "W": 3}).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
@jax.grad
def kernel_gradient(kernel, rank):
    first, second = Separable(rank).factor(kernel)
    return jnp.sum(jnp.sin(merge(first, second))) + jnp.sum(first * second.mean())


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank, dtype", [(1, "float32"), (4, "float32"), (6, "bfloat16")])
def test_gradients_are_finite_for_kernels_with_equal_singular_values(name, rank, dtype):
    found = kernel_gradient(kernel_of(name, dtype), rank)
    chex.assert_tree_all_finite(found)
    chex.assert_type(found, dtype)


def test_at_full_rank_the_gradient_is_that_of_the_kernel_itself():
    kernel = kernel_of("identity", "float32")
    whole = jax.jit(jax.grad(lambda x: jnp.sum(jnp.cos(merge(*Separable(6).factor(x))))))(kernel)
    chex.assert_trees_all_close(whole, -jnp.sin(kernel), atol=1e-5)


def test_a_stack_has_the_derivatives_of_its_parts():
    stack = np.random.default_rng(0).standard_normal((3, *SHAPES[0])).astype(np.float32)
    value, found = gradient(of_product, 2)(stack)
    parts = [gradient(of_product, 2)(part) for part in stack]
    # Float32 over gaps between squared singular values, which magnify rounding.
    np.testing.assert_allclose(found, np.stack([part[1] for part in parts]), atol=1e-4)
    np.testing.assert_allclose(value, sum(part[0] for part in parts), rtol=1e-5)
