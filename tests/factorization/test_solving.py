"""Systems of equations with covariances, definite or not."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization import solving

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@few
@given(seeds, st.integers(1, 8), st.integers(1, 5), st.booleans())
def test_definite_equations_are_solved_whatever_the_order_of_the_arrays(seed, size, width, by_row):
    rng = np.random.default_rng(seed)
    root, right = rng.standard_normal((size, size + 3)), rng.standard_normal((size, width))
    normal = np.array(root @ root.T, order="C" if by_row else "F")
    before = normal.copy(), right.copy()
    for found in (solving.solve(normal, right), solving.Inverse(normal)(right)):
        # The inverse is of the covariance raised by 1e-10 of its mean.
        np.testing.assert_allclose(normal @ found, right, atol=1e-6 * np.linalg.cond(normal))
    chol = solving.cholesky(normal)
    np.testing.assert_allclose(chol.T @ solving.solve_triangular(chol, right), right, atol=1e-9)
    assert all((a == b).all() for a, b in zip(before, (normal, right), strict=True))


@few
@given(seeds, st.integers(0, 5), st.floats(-12, 12))
def test_singular_normal_equations_have_the_solution_without_the_null_space(seed, rank, power):
    rng = np.random.default_rng(seed)
    root = 10**power * rng.standard_normal((6, rank))
    normal = root @ root.T
    right = normal @ rng.standard_normal((6, 2))
    expected = np.linalg.pinv(normal, rcond=1e-10, hermitian=True) @ right
    np.testing.assert_allclose(
        solving.solve(normal, right), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
    )


@few
@given(seeds, st.integers(0, 6), st.floats(0, 1e-6))
def test_the_root_of_a_covariance_survives_rank_deficiency_and_rounding(seed, rank, rounding):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((6, rank))
    noise = rng.standard_normal((6, 6))
    matrix = root @ root.T - rounding * (noise + noise.T)
    lower = solving.cholesky(matrix)
    assert np.isfinite(lower).all() and np.all(np.diag(lower) != 0)
    limit = 1e-4 * np.abs(matrix).max() + 20 * rounding + (1.1 if rank == 0 else 0)
    np.testing.assert_allclose(lower @ lower.T, matrix, atol=limit)
