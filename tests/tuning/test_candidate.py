"""Candidates: slices of the batch, and algorithms that are chosen once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.tuning.algorithms import PLAIN, Layer
from lowrank_jax.tuning.candidate import (
    Candidate,
    Choices,
    Configuration,
    asked_of,
    batch_of,
    in_slices,
)
from lowrank_jax.tuning.experimental.pools import Pool
from lowrank_jax.tuning.result import network_of

LAYER = Layer((4, 8, 8, 4), 16, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1))
POOL = Pool((4, 8, 8, 4), (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0),) * 4, "max")
CHOICES = Choices({(LAYER, None): "im2col", (LAYER, lr.Separable(2)): "padded"}, {POOL: "slices"})


def of_shape(what, *shape):
    return dataclasses.replace(what, inputs=shape)


def both(scale, inputs):
    """A function of a pytree of inputs that gives a pytree of outputs."""
    image, rest = inputs["image"], inputs["rest"]
    return {"sum": scale * image.sum((1, 2)) + rest[0], "same": rest[1]}


@pytest.mark.slow
@settings(max_examples=8)
@given(st.integers(1, 9), st.integers(1, 10), st.booleans())
def test_slices_of_any_inputs_give_the_outputs_of_the_whole_batch(batch, size, jitted):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((batch, *shape))) for shape in ((2, 3), (), (4,))]
    inputs = {"image": arrays[0], "rest": (arrays[1], arrays[2])}
    run = in_slices(both, size)
    found, wanted = (jax.jit(run) if jitted else run)(2.0, inputs), both(2.0, inputs)
    for name, own in wanted.items():
        np.testing.assert_allclose(found[name], own, atol=1e-6)
    assert in_slices(both, None) is both


@pytest.mark.parametrize(
    "inputs", [jnp.ones(()), (), {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}, [np.ones(2), 1.0]]
)
def test_inputs_without_one_batch_are_refused(inputs):
    with pytest.raises(ValueError, match=r"shapes .* are not allowed; give at least one array"):
        batch_of(inputs)


def test_choices_hold_for_any_batch_and_for_no_other_image():
    for batch in (1, 4, 100):
        assert CHOICES.algorithm(of_shape(LAYER, batch, 8, 8, 4), None) == "im2col"
        assert CHOICES.algorithm(of_shape(LAYER, batch, 8, 8, 4), lr.Separable(2)) == "padded"
        assert CHOICES.pool(of_shape(POOL, batch, 8, 8, 4)) == "slices"
    assert CHOICES.algorithm(of_shape(LAYER, 4, 9, 9, 4), None) == "convolve"
    assert CHOICES.algorithm(of_shape(LAYER, 4, 9, 9, 4), lr.Separable(2)) == PLAIN
    assert CHOICES.algorithm(LAYER, lr.Separable(3)) == PLAIN
    assert CHOICES.pool(of_shape(POOL, 4, 9, 9, 4)) == "window"


def test_choices_of_plain_algorithms_do_not_differ():
    plain = Choices({(LAYER, None): "convolve", (LAYER, lr.Separable(2)): PLAIN}, {POOL: "window"})
    assert not Choices().differ and not plain.differ and CHOICES.differ
    assert Choices({}, {POOL: "slices"}).differ


def test_a_candidate_says_how_it_runs():
    some = Configuration({"option": True}, 8)
    assert str(Candidate(some)) == "option=True, slices of 8"
    assert str(Candidate(Configuration(), CHOICES)) == "default options, all at once, algorithms"


class Net(nn.Module):
    """Two equal convolutions, one other, and a pooling."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.Conv(4, (3, 3))(x)
        return nn.Conv(2, (1, 3))(nn.max_pool(x, (2, 2), (2, 2)))


@pytest.fixture(scope="module")
def net():
    model, images = Net(), jax.random.normal(jax.random.key(1), (5, 8, 8, 4))
    variables = model.init(jax.random.key(0), images)
    small = {"params": lr.decompose(variables["params"], {"Conv_0": 2})}
    return network_of(model.apply, (), {}), small, images


def test_layers_and_poolings_of_a_network_are_listed_once_whatever_the_batch(net):
    network, small, images = net
    layers, pools = asked_of(network, (small, images), [2, None, 4])
    assert [(layer.inputs, scheme and scheme.rank) for layer, scheme in layers] == [
        ((2, 8, 8, 4), 2),
        ((2, 8, 8, 4), None),
        ((2, 4, 4, 4), None),
    ]
    assert [pool.inputs for pool in pools] == [(2, 8, 8, 4)]


@pytest.mark.parametrize("size", [None, 2])
def test_a_compiled_candidate_gives_the_outputs_of_the_network(net, size):
    network, small, images = net
    layers, pools = asked_of(network, (small, images), [size])
    names = {True: "im2col", False: "kn2row+im2col"}
    choices = Choices(
        {own: names[own[1] is None] for own in layers}, dict.fromkeys(pools, "slices")
    )
    run = Candidate(Configuration({}, size), choices).compiled(network)
    text = str(jax.make_jaxpr(run)(small, images))
    assert "reduce_window" not in text
    np.testing.assert_allclose(run(small, images), network(None)(small, images), atol=1e-5)
