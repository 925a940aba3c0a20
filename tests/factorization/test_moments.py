"""Moments add up over disjoint sets of images, and are the statistics of all samples together."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.factorization.moments import Moments


def moments_of(x, y):
    """The moments of samples x (count, groups, p) and y (count, groups, m)."""
    xx, xy = np.einsum("igp,igq->gpq", x, x), np.einsum("igp,igm->gpm", x, y)
    return Moments(len(x), x.sum(0), y.sum(0), xx, xy, (y**2).sum(0))


def samples(seed, count, groups=2):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, groups, 3)) + 1, rng.standard_normal((count, groups, 2)) - 2


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 9))
def test_moments_of_disjoint_sets_add_up_to_those_of_all(seed, cut):
    x, y = samples(seed, 10)
    together = moments_of(x[:cut], y[:cut]) + moments_of(x[cut:], y[cut:])
    for field in dataclasses.fields(Moments):
        np.testing.assert_allclose(
            getattr(together, field.name), getattr(moments_of(x, y), field.name)
        )


def test_covariances_are_those_of_the_samples():
    x, y = samples(0, 20)
    found = moments_of(x, y)
    for group in range(2):
        both = np.cov(x[:, group].T, y[:, group].T, ddof=0)
        np.testing.assert_allclose(found.covariance[group], both[:3, :3])
        np.testing.assert_allclose(found.cross[group], both[:3, 3:])
        np.testing.assert_allclose(found.variance[group], np.diag(both)[3:])
        np.testing.assert_allclose(found.total_variance[group], np.trace(both[3:, 3:]))
    np.testing.assert_allclose(found.mean_x, x.mean(0))
    np.testing.assert_allclose(found.mean_y, y.mean(0))


def test_moments_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        moments_of(*samples(0, 2)).count = 3
