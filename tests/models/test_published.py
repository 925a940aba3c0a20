"""The networks with published ranks are the published ones, and run with their factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import decompose, lowrank, reconstruct, trace
from lowrank_jax.models.published import PUBLISHED
from lowrank_jax.tree.rules import resolve

# The smallest images whose maps do not vanish in the poolings.
SIZES = {
    "CaffeNet": 67,
    "AlexNet": 63,
    "VGG-16": 32,
    "GoogLeNet": 32,
    "ImageNet NIN": 67,
    "ResNet-18": 32,
    "NIN": 8,
    "CIFAR CNN": 8,
}
SLOW = ("VGG-16", "GoogLeNet", "ImageNet NIN", "ResNet-18")
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PUBLISHED]


@functools.cache
def skeleton(name, size=None):
    """Shapes of the variables and of one image; no array is made."""
    network = PUBLISHED[name]
    size = size or network.size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(network.build().init, jax.random.key(0), image), image


@pytest.mark.parametrize("name", NAMES)
def test_a_network_with_factors_computes_what_it_does_with_their_product(name, random):
    model = PUBLISHED[name].build()
    dense, image = skeleton(name, SIZES[name])
    program = trace(model.apply, dense, image)
    skeletons = jax.eval_shape(lambda t: decompose(t, PUBLISHED[name].ranks, program), dense)
    small = random(skeletons, gain=2)
    images = np.random.default_rng(1).standard_normal((2, *image.shape[1:]), np.float32)
    found = jax.jit(lowrank(model.apply))(small, images)
    expected = jax.jit(model.apply)(reconstruct(small), images)
    assert np.abs(expected).max() > 0 and np.ptp(expected) > 0
    # Up to 22 layers of float32 sums of up to 4608 terms.
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name, published",
    [("ResNet-18", 11_689_512), ("GoogLeNet", 6_998_552), ("AlexNet", 2_469_696)],
)
def test_a_network_has_the_published_parameters(name, published):
    params = skeleton(name)[0]["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


@pytest.mark.parametrize("name, published", [("ResNet-18", 1.81), ("GoogLeNet", 1.58)])
def test_a_network_has_the_published_macs(name, published):
    assert round(PUBLISHED[name].trace().macs / 1e9, 2) == published


SIDES = {
    "GoogLeNet": {
        "conv1": 112,
        "conv2": 56,
        "inception_3b/5x5": 28,
        "inception_4e/3x3": 14,
        "inception_5b/pool_proj": 7,
    },
    "ImageNet NIN": {"conv1": 54, "conv2": 27, "conv3": 13, "conv4": 6, "cccp8": 6},
}


@pytest.mark.parametrize("name", SIDES)
def test_the_maps_have_the_sizes_of_caffes(name):
    found = {use.path: use.outputs[1] for use in PUBLISHED[name].trace()}
    assert {path: found[path] for path in SIDES[name]} == SIDES[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ranks_name_the_layers_with_taps_alone(name):
    program = PUBLISHED[name].trace()
    taps = {use.path for use in program if use.kind == "conv" and use.kernel_shape[0] > 1}
    dense = {"Conv_4"} if name == "NIN" else set()  # the authors leave its 3x3 layer as it is
    assert set(resolve(PUBLISHED[name].ranks, program)) == taps - dense
