"""Re-estimated statistics are those of the data, for any program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import calibrate, decompose, lowrank
from lowrank_jax.calibration.batch_norm import reestimate


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False, name="conv")(x)
        x = nn.BatchNorm(not train, momentum=0.99, name="norm")(x)
        return nn.Conv(6, (3, 3), name="free")(nn.relu(x))


@pytest.fixture
def variables():
    return Normed().init(jax.random.key(0), normal(8, 5, 5, 4))


def statistics(kernel_tree, x):
    outputs = lowrank(nn.Conv(6, (3, 3), use_bias=False).apply)({"params": kernel_tree}, x)
    return outputs.mean((0, 1, 2)), outputs.var((0, 1, 2))


@pytest.mark.parametrize("cut", [False, True], ids=["dense", "decomposed"])
def test_statistics_are_those_of_the_data(variables, cut):
    x = normal(8, 5, 5, 4)
    tree = decompose(variables, {"conv": 2}) if cut else variables
    found = reestimate(lowrank(Normed().apply), tree, [x[:4], x[4:]], train=True)
    mean, variance = statistics(tree["params"]["conv"], x)
    # A hundredth of the batch's statistic is told in float32, to 1e-5 of it.
    np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], mean, atol=2e-5)
    np.testing.assert_allclose(found["batch_stats"]["norm"]["var"], variance, rtol=1e-4)
    assert found["params"] is tree["params"]


def test_a_function_that_was_compiled_before_gives_the_new_statistics(variables):
    x = normal(8, 5, 5, 4)
    run = jax.jit(Normed().apply, static_argnames=("train", "mutable"))
    run(variables, x, train=True, mutable=("batch_stats",))

    def apply(variables, x, train, mutable):
        return run(variables, x, train=train, mutable=tuple(mutable))

    found = reestimate(apply, variables, x, train=True)
    mean, _ = statistics(variables["params"]["conv"], x)
    np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], mean, atol=2e-5)


def test_normalisations_in_a_scan_have_statistics_of_their_own():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            axes = {"params": 0, "batch_stats": 0}
            body = lambda norm, x, _: (2 * norm(x) + 1, None)  # noqa: E731
            scan = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=2)
            return scan(nn.BatchNorm(not train, name="norm"), x, None)[0]

    x = normal(8, 5, 5, 4)
    variables = Scanned().init(jax.random.key(0), x, train=True)
    found = reestimate(Scanned().apply, variables, x, train=True)["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"][0], x.mean((0, 1, 2)), atol=2e-5)
    np.testing.assert_allclose(found["mean"][1], jnp.ones(4), atol=1e-3)  # two halves of the images


def test_the_variance_over_batches_is_found_whatever_the_layer_is_called():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False, name="variation")(x)

    batches = [jnp.zeros((4, 2)), 2 * jnp.ones((4, 2))]
    start = Net().init(jax.random.key(0), batches[0])
    found = reestimate(Net().apply, start, batches)["batch_stats"]["variation"]
    np.testing.assert_allclose(found["mean"], 1, atol=1e-4)
    np.testing.assert_allclose(found["var"], 1, atol=1e-4)


def test_what_cannot_be_reestimated_is_refused(variables):
    x = normal(2, 5, 5, 4)
    with pytest.raises(ValueError, match="norm/mean: the activations hold NaN"):
        reestimate(Normed().apply, variables, x * jnp.inf, train=True)
    with pytest.raises(ValueError, match="updates no statistics"):
        reestimate(Normed().apply, variables, x, train=False)
    with pytest.raises(ValueError, match="No calibration data"):
        reestimate(Normed().apply, variables, [], train=True)
    layer = nn.Conv(6, (3, 3))
    with pytest.raises(ValueError, match="no batch normalisation"):
        reestimate(layer.apply, layer.init(jax.random.key(0), x), x)


def test_calibration_does_not_take_training_for_evaluation(variables):
    with pytest.raises(ValueError, match="train=True is not allowed"):
        calibrate(Normed().apply, variables, normal(2, 5, 5, 4), train=True)
