"""The rank of a noisy matrix by empirical variational Bayes."""

import numpy as np
import pytest

from lowrank_jax.planning.variational import evbmf_rank


@pytest.mark.parametrize("shape", [(30, 30), (20, 60)])
@pytest.mark.parametrize("rank", [0, 1, 6])
def test_the_variational_rank_is_that_of_the_signal_whatever_the_scale(shape, rank):
    rng = np.random.default_rng(rank)
    signal = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    values = np.linalg.svd(3 * signal + 0.1 * rng.standard_normal(shape), compute_uv=False)
    assert evbmf_rank(values, shape[1]) == evbmf_rank(1e-6 * values, shape[1]) == rank


def test_the_variational_rank_of_matrices_without_noise_is_their_own():
    rng = np.random.default_rng(0)
    values = np.linalg.svd(
        rng.standard_normal((20, 4)) @ rng.standard_normal((4, 30)), compute_uv=False
    )
    exact = np.where(np.arange(20) < 4, values, 0)
    assert evbmf_rank(exact, 30) == 4 and evbmf_rank(np.zeros(5), 5) == 0
    assert evbmf_rank(np.array([2.0]), 1) in (0, 1)
