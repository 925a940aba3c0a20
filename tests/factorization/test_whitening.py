"""Factors for given moments: the plain SVD for white data, the optimum for Kronecker data."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization import whitening
from lowrank_jax.factorization.whitening import Target, merged

few = settings(max_examples=20)
seeds = st.integers(0, 2**31)
SHAPE = (3, 6, 4)  # taps of the second convolution, rows, outputs


def problem(seed, rank=None, ridge=0.0):
    """A kernel, and its own outputs of random correlated patches as the target."""
    rng = np.random.default_rng(seed)
    size = SHAPE[0] * SHAPE[1]
    mix = rng.standard_normal((size, rank or size)) * rng.uniform(0.1, 2, rank or size)
    patches = rng.standard_normal((200, rank or size)) @ mix.T
    covariance = patches.T @ patches / 200 + ridge * np.eye(size)
    kernel = rng.standard_normal(SHAPE)
    return kernel, target_of(kernel, covariance)


def target_of(kernel, covariance):
    """The outputs of a kernel as the target."""
    flat = kernel.reshape(len(covariance), -1)
    cross = covariance @ flat
    return Target(covariance, cross, np.sum(flat * cross, axis=0), len(kernel))


def error_of(target, first, second):
    return target.error(merged(first, second)).sum()


def kronecker_problem(seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(SHAPE)
    roots = rng.standard_normal((3, 3)), rng.standard_normal((6, 6))
    offsets, strips = (root @ root.T + 0.1 * np.eye(len(root)) for root in roots)
    return kernel, target_of(kernel, np.kron(offsets, strips))


def alternate(target, first, second, sweeps=60):
    """Alternating least squares on the normal equations as a whole: a generic optimiser."""
    size = len(target.covariance)
    for _ in range(sweeps):
        for free in (1, 0):
            shape = (first.shape, second.shape)[free]
            basis = np.eye(np.prod(shape)).reshape(-1, *shape)
            kernels = [merged(first, e) if free else merged(e, second) for e in basis]
            design = np.stack([kernel.reshape(size, -1) for kernel in kernels])
            normal = np.einsum("ipn,pq,jqn->ij", design, target.covariance, design, optimize=True)
            right = np.einsum("ipn,pn->i", design, target.cross)
            answer = np.linalg.lstsq(normal, right, rcond=1e-12)[0].reshape(shape)
            first, second = (first, answer) if free else (answer, second)
    return first, second


def plain(kernel, rank):
    """The truncated singular value decomposition of the kernel's matrix."""
    left, values, right = np.linalg.svd(whitening.matrix_of(kernel), full_matrices=False)
    second = (values[:rank, None] * right[:rank]).reshape(rank, len(kernel), -1)
    return left[:, :rank], second.transpose(1, 0, 2)


@few
@given(seeds, st.integers(1, 6))
def test_for_white_patches_the_fit_is_the_plain_svd(seed, rank):
    kernel = problem(seed)[0]
    white = target_of(kernel, np.eye(18))
    fitted = merged(*whitening.fit(kernel, white, [rank]))
    np.testing.assert_allclose(fitted, merged(*plain(kernel, rank)), atol=1e-6)


@pytest.mark.slow
@few
@given(seeds, st.integers(1, 6))
def test_for_a_kronecker_covariance_the_start_is_the_optimum(seed, rank):
    kernel, target = kronecker_problem(seed)
    error = error_of(target, *whitening.fit(kernel, target, [rank], sweeps=0))
    matrix, _ = whitening.whitened(kernel, *whitening.kronecker(target.blocks))
    values = np.linalg.svd(matrix, compute_uv=False)
    scale = 1e-8 * target.variance.sum()
    np.testing.assert_allclose(error, np.sum(values[rank:] ** 2), rtol=1e-6, atol=scale)
    rng = np.random.default_rng(seed)
    start = rng.standard_normal((6, rank)), rng.standard_normal((3, rank, 4))
    assert error <= error_of(target, *alternate(target, *start)) * (1 + 1e-6) + scale


@few
@given(seeds, st.integers(1, 6), st.integers(1, 3))
def test_every_sweep_lowers_the_error(seed, rank, sweeps):
    kernel, target = problem(seed, ridge=1e-3)
    before = error_of(target, *whitening.fit(kernel, target, [rank], sweeps=sweeps - 1))
    after = error_of(target, *whitening.fit(kernel, target, [rank], sweeps=sweeps))
    assert after <= before * (1 + 1e-9) + 1e-9 * target.variance.sum()


@few
@given(seeds, st.integers(1, 5))
def test_each_refit_lowers_the_error_and_is_its_own_optimum(seed, rank):
    _, target = problem(seed, ridge=1e-3)
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((6, rank)), rng.standard_normal((3, rank, 4))
    errors = [error_of(target, first, second)]
    for _ in range(2):
        second = whitening.least_squares(target.reduced(first))
        errors.append(error_of(target, first, second))
        first = whitening.refit_first(first, second, target, *whitening.kronecker(target.blocks))
        errors.append(error_of(target, first, second))
    slack = 1e-9 * target.variance.sum()
    assert all(after <= before * (1 + 1e-9) + slack for before, after in itertools.pairwise(errors))
    gradient = target.covariance @ merged(first, second).reshape(18, -1) - target.cross
    slope = np.einsum("xrn,xkn->rk", gradient.reshape(SHAPE), second)
    size = np.einsum("xrn,xkn->rk", target.wanted, second)
    assert np.abs(slope).max() < 1e-2 * np.abs(size).max()


def test_the_error_is_that_of_the_outputs():
    kernel, target = problem(1)
    first, second = plain(kernel, 2)
    gap = (kernel - merged(first, second)).reshape(18, -1)
    np.testing.assert_allclose(
        error_of(target, first, second), np.sum(gap * (target.covariance @ gap))
    )


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 1e6])
def test_a_ridge_leaves_the_kernel_the_answer(ridge):
    kernel, target = problem(2)
    found = whitening.least_squares(target.ridged(kernel, ridge))
    np.testing.assert_allclose(found, kernel, atol=1e-8)


def test_at_full_rank_the_fit_is_the_kernel():
    kernel, target = problem(3)
    np.testing.assert_allclose(merged(*whitening.fit(kernel, target, [6])), kernel, atol=1e-6)


def test_balancing_keeps_the_kernel():
    first, second = plain(problem(4)[0], 3)
    found = whitening.balance(5 * first, second)
    np.testing.assert_allclose(merged(*found), 5 * merged(first, second))
    np.testing.assert_allclose(np.linalg.norm(found[0]), np.linalg.norm(found[1]))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_patches_does_not_matter(scale):
    kernel, target = problem(5)
    expected = merged(*whitening.fit(kernel, target, [2]))
    scaled = target_of(kernel, scale * target.covariance)
    np.testing.assert_allclose(merged(*whitening.fit(kernel, scaled, [2])), expected, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 2])
def test_patches_of_low_rank_leave_finite_factors(rank):
    kernel, target = problem(6, rank=rank)
    ridged = target.ridged(kernel, 1e-4)
    assert all(np.isfinite(factor).all() for factor in whitening.fit(kernel, ridged, [4]))
