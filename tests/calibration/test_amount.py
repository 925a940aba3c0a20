"""Images are enough where the widest layer has ten samples for each of its inputs."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lowrank_jax import calibrate, compress, trace
from lowrank_jax.calibration.amount import ENOUGH, Amount


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.Conv(16, (3, 3), feature_group_count=2)(x)
        return nn.Dense(4)(x[:, :2, :2].reshape(len(x), -1))


@pytest.fixture(scope="module")
def program():
    images = jnp.ones((1, 6, 6, 4))
    variables = jax.eval_shape(Net().init, jax.random.key(0), images)
    return trace(Net().apply, variables, images)


def test_the_widest_layer_counts_with_its_positions_and_16_at_most(program):
    found = Amount.of(program, 100)
    assert (found.path, found.inputs, found.samples) == ("Dense_0", 64, 100)
    first = trace(nn.Conv(8, (3, 3)).apply, {"params": {"kernel": jnp.ones((3, 3, 4, 8)),
                  "bias": jnp.ones(8)}}, jnp.ones((1, 6, 6, 4)))  # fmt: skip
    assert (Amount.of(first, 10).inputs, Amount.of(first, 10).samples) == (36, 160)


@given(st.integers(1, 5000))
def test_so_many_images_as_are_wanted_are_enough_and_one_less_is_not(images):
    found = Amount(images=images, samples=4 * images, inputs=64, path="head")
    assert found.wanted == ENOUGH * 64 / 4
    assert ("which is enough" in str(found)) == (images >= found.wanted)


def _calibrated(run, tree, images):
    calibrate(run, tree, images)


def _compressed(run, tree, images):
    compress(run, tree, images, {"head": 2})


@pytest.mark.parametrize("verb", [_calibrated, _compressed])
@pytest.mark.parametrize("given", [lambda x: x, lambda x: [x[:2], x[2:]], lambda x: lambda: [x]])
@pytest.mark.parametrize("count, level", [(4, "WARNING"), (400, "INFO")])
def test_the_verbs_say_whether_the_images_are_enough(count, level, given, verb, caplog):
    caplog.set_level("INFO", "lowrank_jax")
    verb(lambda tree, x: x @ tree["head"], {"head": jnp.ones((8, 4))}, given(jnp.ones((count, 8))))
    (line,) = [r for r in caplog.records if r.levelname == level and "widest layer" in r.message]
    assert f"{count} images give {count} samples for the 8 inputs" in line.message


def test_a_network_without_layers_needs_none():
    assert (
        Amount.of(trace(lambda v, x: v["a"] + x, {"a": jnp.ones(3)}, jnp.ones((1, 3))), 4) is None
    )
