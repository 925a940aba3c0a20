"""A layer is fitted again from rows that give what the layer gives in the network."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Matrix, Separable, compress, lowrank, max_rank, trace
from lowrank_jax.compression import refitting
from lowrank_jax.compression.layer_fits import LayerFits
from lowrank_jax.compression.refitting import Sample


def convolution(shape, padding="SAME", **options):
    options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    return lambda kernel, x: jax.lax.conv_general_dilated(
        x, kernel, padding=padding, **options
    ), shape


LAYERS = {
    "plain": convolution((3, 3, 4, 6)),
    "strides": convolution((3, 3, 4, 6), window_strides=(2, 1)),
    "dilated": convolution((3, 3, 4, 6), rhs_dilation=(2, 2)),
    "transposed": convolution((3, 3, 4, 6), lhs_dilation=(2, 2), padding=((1, 1), (1, 1))),
    "groups": convolution((3, 3, 2, 6), feature_group_count=2),
    "depthwise": convolution((3, 3, 1, 4), feature_group_count=4),
    "channels first": convolution((6, 4, 3, 3), dimension_numbers=("NHWC", "OIHW", "NCHW")),
    "inputs last": convolution((3, 6, 3, 4), dimension_numbers=("NHWC", "HOWI", "NHWC")),
    "turned round": (
        lambda kernel, x: convolution(None)[0](kernel[::-1, :, ::-1], x),
        (3, 3, 4, 6),
    ),
    "product": (lambda kernel, x: x @ kernel, (4, 6)),
    "product from the left": (lambda kernel, x: jnp.einsum("oi,nhwi->nhwo", kernel, x), (6, 4)),
    "stack of layers": (
        lambda kernel, x: jax.lax.dot_general(
            jnp.stack([x, -x]).reshape(2, -1, 4), kernel, (((2,), (1,)), ((0,), (0,)))
        ),
        (2, 4, 6),
    ),
    "pointwise": convolution((1, 1, 4, 6)),
}


def smooth(count, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, 7, 8, 4))
    for axis in (1, 2):
        x = x + np.roll(x, 1, axis)
    return jnp.asarray(x, jnp.float32)


def network(name):
    layer, shape = LAYERS[name]

    def apply(tree, x):
        return jax.nn.relu(layer(tree["w"], x) - 0.1)

    kernel = np.random.default_rng(1).standard_normal(shape)
    return apply, {"w": jnp.asarray(kernel, jnp.float32)}


@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_the_rows_give_what_the_dense_layer_gives(name, monkeypatch):
    apply, tree = network(name)
    x, rows, fitted = smooth(24), [], []
    keep, fit = Sample.keep, LayerFits.fit
    monkeypatch.setattr(Sample, "keep", lambda self, own: (rows.append(own), keep(self, own)))
    monkeypatch.setattr(LayerFits, "fit", lambda *own: (fitted.append(own[:3]), fit(*own)))
    (use,) = trace(apply, tree, x).at("w")
    full = max_rank(use.kernel_shape, use.groups, use.axes, use.forms[0])
    compress(apply, tree, x, {"w": use.scheme(full)})
    layers, path, reading = fitted[-1]
    for patches, (dense, *_) in rows:
        own = refitting._product(patches, layers.kernel(path, reading))
        # Float32 sums of up to 36 products, and factors in float32.
        np.testing.assert_allclose(own, dense, atol=1e-4 * float(jnp.abs(dense).max()))
    assert rows


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_activation_gives_is_closer_than_without(name, monkeypatch):
    apply, tree = network(name)
    x, fresh, errors = smooth(128), smooth(128, 1), []
    for again in (0, 2):
        monkeypatch.setattr(refitting, "AGAIN", again)
        small = compress(apply, tree, x, {"w": 1})
        errors.append(float(jnp.mean((apply(tree, fresh) - lowrank(apply)(small, fresh)) ** 2)))
    assert errors[1] < 1.01 * errors[0]  # a hundredth for what other images are


def test_rows_go_with_the_layer_that_they_are_of():
    """No cycle of references may hold them, since they are large."""
    apply, tree = network("plain")
    kept = []
    old = Sample.keep

    def noted(sample, rows):
        kept.append(weakref.ref(sample))
        old(sample, rows)

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sample, "keep", noted)
            compress(apply, tree, smooth(16), {"w": 2})
        assert kept and all(sample() is None for sample in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_networks_of_any_type_are_fitted_again(dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), dtype=dtype, param_dtype=dtype)(x)
            return nn.Dense(3, dtype=dtype, param_dtype=dtype)(nn.gelu(nn.relu(x)).mean((1, 2)))

    x = smooth(64).astype(dtype)
    variables = Net().init(jax.random.key(0), x)
    small = compress(Net().apply, variables, x, {"Conv_0": Separable(3), "Dense_0": Matrix(2)})
    leaves = jax.tree.leaves(small)
    assert all(leaf.dtype == dtype and jnp.isfinite(leaf).all() for leaf in leaves)
