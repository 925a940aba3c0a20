"""How much of what some inputs tell is noise."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import calibrate
from lowrank_jax.factorization.strips import shrunk
from lowrank_jax.planning.planner import calibrated_spectra

INPUTS, OUTPUTS = 48, 40


def apply(tree, x):
    return x @ tree["kernel"]


def drawn(seed, count, alike=1):
    """A kernel, and inputs (count, alike, INPUTS) of falling variance, alike within an image."""
    rng = np.random.default_rng(seed)
    scales = 0.9 ** np.arange(INPUTS)
    kernel = rng.normal(size=(INPUTS, OUTPUTS))
    x = np.repeat(rng.normal(size=(count, 1, INPUTS)), alike, axis=1) * scales + 1
    return {"kernel": jnp.asarray(kernel, jnp.float32)}, jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("count", [20, 100, 400])
@pytest.mark.parametrize("alike", [1, 8])
def test_samples_that_are_alike_count_once(count, alike):
    # The covariances of 20 directions that matter tell their number to about a fifth.
    for seed in range(4):
        found = calibrate(apply, *drawn(seed, count, alike)).moments["kernel"][()]
        assert found.count == count * alike
        assert 0.5 * count <= found.samples <= min(1.5 * count, found.count)


def test_one_set_of_inputs_tells_no_noise_and_counts_as_one_sample():
    found = calibrate(apply, *drawn(0, 1, 8)).moments["kernel"][()]
    assert (found.count, found.samples) == (8, 1)


@pytest.mark.parametrize("seed", range(8))
def test_a_covariance_of_one_sample_is_the_expected_one_and_of_many_its_own(seed):
    rng = np.random.default_rng(seed)
    wide, tall = (x @ x.T for x in (rng.normal(size=(6, 1 + seed)), rng.normal(size=(6, 9))))
    expected = tall * (np.trace(wide) / np.trace(tall))
    np.testing.assert_allclose(shrunk(wide, tall, 1), expected, rtol=1e-12)
    np.testing.assert_allclose(shrunk(wide, tall, 1e9), wide, rtol=1e-5, atol=1e-6)
    assert np.isclose(np.trace(shrunk(wide, tall, 20)), np.trace(wide))


def test_inputs_that_do_not_vary_have_no_noise():
    tree, x = drawn(0, 6)
    found = calibrate(apply, tree, jnp.ones_like(x)).moments["kernel"][()]
    assert found.samples == found.count


@pytest.mark.parametrize("alike", [1, 4])
@pytest.mark.parametrize("rank", [4, 8, 12, 16, 20])
def test_a_plan_foretells_the_error_on_other_images_from_few(rank, alike):
    """Of 20 images a rank of 20 leaves nothing out, and of others a few percent."""
    for seed in range(4):
        tree, x = drawn(seed, 20, alike)
        foretold = calibrated_spectra(calibrate(apply, tree, x)).left_out("kernel", "left")[rank]
        kernel = np.asarray(tree["kernel"])
        own, other = (np.cov((np.asarray(a).reshape(-1, INPUTS) @ kernel).T) for a in (x, fresh()))
        space = np.linalg.eigh(own)[1][:, -rank:]
        error = 1 - np.trace(space.T @ other @ space) / np.trace(other)
        assert error / 3 <= foretold <= 4 * error, seed


def fresh():
    return drawn(99, 4000)[1]
