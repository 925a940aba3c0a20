"""A kernel that stays dense is fitted by ridge regression, where held-out images support it."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization.axes import OUTPUTS
from lowrank_jax.factorization.merging import multiplied
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.factorization.whole import fit_whole, whole_scheme

few = settings(max_examples=20)
seeds = st.integers(0, 2**31)
ROUNDING = 1e-9  # relative, in float64: solves of well conditioned systems
CASES = [
    ("HWIO", (3, 3, 2, 6), 1),
    ("HWIO", (3, 3, 2, 6), 3),
    ("HWIO", (3, 3, 1, 5), 5),
    ("OIHW", (6, 2, 3, 3), 2),
    ("WIO", (3, 4, 6), 1),
    ("IWHO", (4, 3, 3, 6), 1),
    ("IO", (7, 6), 1),
    ("OI", (6, 7), 1),
    ("IPO", (7, 2, 3), 1),
    ("PJOI", (2, 3, 2, 2), 1),
]


def rows_of(kernel, axes, groups):
    """The kernel of each group (g, p, m), patches in the stored order of its axes."""
    stored = [axes.index(letter) for letter in axes if letter not in OUTPUTS]
    outputs = [axes.index(letter) for letter in axes if letter in OUTPUTS]
    width = np.prod([kernel.shape[axis] for axis in outputs])
    flat = kernel.transpose(*stored, *outputs).reshape(-1, width)
    return flat.reshape(len(flat), groups, -1).swapaxes(0, 1)


def data(rng, kernel, axes, groups, count, noise=0.0, gain=1.0):
    """Patches (g, n, p), and outputs (g, n, m) of a multiple of a kernel."""
    rows = rows_of(kernel, axes, groups)
    x = rng.normal(size=(groups, count, rows.shape[1])) + 1
    y = gain * x @ rows + noise * rng.normal(size=(groups, count, rows.shape[2]))
    return x, y


def moments(x, y):
    xx, xy = x.swapaxes(1, 2) @ x, x.swapaxes(1, 2) @ y
    return Moments(x.shape[1], x.sum(1), y.sum(1), xx, xy, (y**2).sum(1))


def fitted(kernel, folds, axes, groups):
    fit = fit_whole(kernel, folds, whole_scheme(axes, kernel.shape, groups))
    return fit, multiplied(fit.first, fit.second, axes)


@pytest.mark.parametrize("axes, shape, groups", CASES)
@few
@given(seed=seeds)
def test_the_kernel_becomes_that_of_a_ridge_regression(axes, shape, groups, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=shape)
    parts = [data(rng, kernel, axes, groups, 200, 0.1, 0.5) for _ in range(2)]
    fit, found = fitted(kernel, [moments(*part) for part in parts], axes, groups)
    assert found.shape == shape and not fit.is_plain and fit.held_out < fit.plain
    x, y = (np.concatenate(own, 1) for own in zip(*parts, strict=True))
    x, y = (own - own.mean(1, keepdims=True) for own in (x, y))
    for own, rows, one, two in zip(
        rows_of(found, axes, groups), rows_of(kernel, axes, groups), x, y, strict=True
    ):
        covariance, cross = one.T @ one / len(one), one.T @ two / len(one)
        ridge = fit.shrinkage * np.trace(covariance) / len(covariance)
        left = covariance + ridge * np.eye(len(covariance))
        np.testing.assert_allclose(
            own, np.linalg.solve(left, cross + ridge * rows), rtol=ROUNDING, atol=ROUNDING
        )


@pytest.mark.parametrize("axes, shape, groups", CASES)
def test_a_kernel_that_is_right_already_stays(axes, shape, groups):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=shape)
    folds = [moments(*data(rng, kernel, axes, groups, 60, noise=1.0)) for _ in range(2)]
    fit, found = fitted(kernel, folds, axes, groups)
    assert fit.held_out <= fit.plain
    if fit.is_plain:
        chex.assert_trees_all_equal(found, kernel)


@few
@given(seed=seeds, count=st.integers(10, 60))
def test_few_noisy_samples_make_nothing_worse(seed, count):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(20, 10))
    folds = [moments(*data(rng, kernel, "IO", 1, count, noise=3.0)) for _ in range(2)]
    _, found = fitted(kernel, folds, "IO", 1)
    x, y = data(rng, kernel, "IO", 1, 2000, noise=3.0)
    x, y = (own - own.mean(1, keepdims=True) for own in (x, y))
    old, new = (float(np.mean((x @ own - y) ** 2)) for own in (kernel, found))
    assert new < 1.1 * old  # two sets of few images may agree by chance


def test_one_set_of_images_leaves_the_kernel_as_it_is():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 4))
    fit, found = fitted(kernel, [moments(*data(rng, kernel, "IO", 1, 90, gain=2))], "IO", 1)
    assert fit.is_plain
    chex.assert_trees_all_equal(found, kernel)


@pytest.mark.parametrize("axes, shape, groups", CASES)
def test_inputs_that_do_not_vary_leave_finite_kernels(axes, shape, groups):
    kernel = np.ones(shape)
    rows = rows_of(kernel, axes, groups)
    x, y = np.zeros((groups, 30, rows.shape[1])), np.ones((groups, 30, rows.shape[2]))
    _, found = fitted(kernel, [moments(x, y)] * 2, axes, groups)
    assert np.isfinite(found).all()


def test_a_fit_to_other_outputs_takes_the_shrinkage_of_the_first():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(6, 4))
    x, y = data(rng, kernel, "IO", 1, 300, noise=0.1, gain=0.5)
    folds = [moments(x[:, :150], y[:, :150]), moments(x[:, 150:], y[:, 150:])]
    scheme = whole_scheme("IO", kernel.shape)
    first = fit_whole(kernel, folds, scheme)
    again = fit_whole(kernel, folds, scheme, first)
    assert (again.shrinkage, again.held_out) == (first.shrinkage, first.held_out)
    chex.assert_trees_all_close(again.first, first.first, rtol=ROUNDING)
