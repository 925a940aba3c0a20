"""Costs read from the program."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lowrank_jax import SeparableConv
from lowrank_jax.models import NIN
from lowrank_jax.trace import trace

X = jnp.zeros((2, 8, 8, 4))


def costs(model, x=X):
    return trace(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)


@pytest.mark.parametrize(
    "options, adds",
    [
        ({}, 2 * 64 * 9 * 4 * 6),
        ({"strides": 2}, 2 * 16 * 9 * 4 * 6),
        ({"padding": "VALID"}, 2 * 36 * 9 * 4 * 6),
        ({"feature_group_count": 2}, 2 * 64 * 9 * 2 * 6),
        ({"kernel_dilation": 2}, 2 * 64 * 9 * 4 * 6),
        ({"dtype": jnp.bfloat16}, 2 * 64 * 9 * 4 * 6),
    ],
)
def test_multiply_adds_of_a_convolution(options, adds):
    (use,) = costs(nn.Conv(6, (3, 3), **options))
    assert use.multiply_adds == adds


def test_a_strided_separable_layer_runs_its_vertical_part_at_full_width():
    vertical, horizontal = costs(SeparableConv(6, (3, 3), 5, strides=2))
    assert (vertical.path, vertical.multiply_adds) == ("vertical", 2 * 4 * 8 * 3 * 4 * 5)
    assert (horizontal.path, horizontal.multiply_adds) == ("horizontal", 2 * 4 * 4 * 3 * 5 * 6)


def test_convolutions_in_nested_calls_and_scans_are_found():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.jit(nn.Conv)(4, (3, 3), name="inner")(x), None

    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="loop")(x, None)[0]

    (use,) = costs(Loop())
    assert (use.path, use.multiply_adds) == ("loop/inner", 3 * 2 * 64 * 9 * 4 * 4)


def test_a_convolution_in_a_cond_is_refused():
    layout = ("NHWC", "HWIO", "NHWC")

    def apply(kernel, x):

        def conv(x):
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

        return jax.lax.cond(x.sum() > 0, conv, lambda x: x, x)

    with pytest.raises(ValueError, match="'cond'"):
        trace(apply, jnp.ones((3, 3, 4, 4)), X)


def test_the_experiments_network_costs_what_its_layers_add_up_to():
    uses = costs(NIN(), jnp.zeros((1, 32, 32, 3)))
    assert [use.path for use in uses] == [f"Conv_{i}" for i in range(6)]
    assert uses[2].multiply_adds == 25 * 96 * 192 * 16 * 16
    assert sum(use.weights for use in uses) == 14400 + 18432 + 460800 + 36864 + 331776 + 1920
