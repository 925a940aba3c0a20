"""Fits are about the means where something behind a layer takes them up; elsewhere about zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax import calibrate, compress, decompose, lowrank, plan, trace
from lowrank_jax.calibration.network import Network
from lowrank_jax.compression.outline import Outline, are_means_matched, fit_places
from lowrank_jax.factorization.separable import Separable


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(low, dense):
    return float(jnp.linalg.norm(low - dense) / jnp.linalg.norm(dense))


def product(p, x):
    return x @ p["w"]


def conv(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)


def biased(p, x):
    return product(p, x) + p["b"]


KERNELS = {product: (16, 24), conv: (3, 3, 6, 12), biased: (16, 24)}


def inputs(apply, count, mean, seed):
    shape = (count, 6, 6, 6) if apply is conv else (count, 16)
    return normal(*shape, seed=seed) + np.float32(mean)


@settings(max_examples=15)
@given(st.sampled_from([product, conv]), st.floats(-10, 10), st.integers(0, 2**20), st.booleans())
def test_a_fit_is_no_worse_than_plain_factors_whatever_the_mean(apply, mean, seed, match):
    tree = {"w": normal(*KERNELS[apply], seed=seed), "b": np.zeros(24, np.float32)}
    x, table = inputs(apply, 256, mean, seed), {"w": 4}
    small = compress(apply, tree, x, table, match_means=match)
    plain = decompose(tree, table, trace=trace(apply, tree, x))
    dense = apply(tree, x)
    # Both may be the plain factors, up to the rounding of float32.
    error, limit = (relative(lowrank(apply)(own, x), dense) for own in (small, plain))
    assert error < limit * (1 + 1e-3)


@pytest.mark.parametrize("mean", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("apply, match", [(product, True), (biased, False)])
def test_without_a_shift_a_fit_reaches_the_optimum_about_zero(apply, match, mean):
    tree = {"w": normal(*KERNELS[apply]), "b": np.zeros(24, np.float32)}
    x = inputs(apply, 2048, mean, seed=1)
    dense = apply(tree, x)
    left = np.linalg.svd(dense, full_matrices=False)
    optimum = np.sqrt(np.sum(left[1][4:] ** 2) / np.sum(left[1] ** 2))
    small = compress(apply, tree, x, {"w": 4}, match_means=match)
    # The ridge, and the part of the outputs' importance that is estimated.
    assert relative(lowrank(apply)(small, x), dense) < 1.02 * optimum


def test_images_without_any_variance_are_computed_as_they_were():
    tree = {"w": normal(3, 3, 6, 12)}
    x = np.full((32, 6, 6, 6), 2, np.float32)
    small = compress(conv, tree, x, {"w": 9})
    # Patches differ at the edges alone, in nine ways. The ridge is left.
    assert relative(lowrank(conv)(small, x), conv(tree, x)) < 1e-3


class Before(nn.Module):
    """Normalisation before each convolution: none of these has a shift of its own."""

    ends: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        y = nn.relu(nn.BatchNorm(True, name="one")(x))
        x = x + nn.Conv(8, (3, 3), use_bias=False, name="conv")(y)
        return nn.relu(nn.BatchNorm(True, name="two")(x)) if self.ends else x


@pytest.mark.parametrize("ends", [True, False])
def test_normalisations_over_residual_sums_take_up_means(ends):
    model, x = Before(ends), normal(2, 6, 6, 3)
    variables = model.init(jax.random.key(0), x)
    outline = Outline(Network(model.apply, variables).program((x,)))
    places = fit_places(outline, dict.fromkeys(["stem", "conv"], Separable(1)))
    assert [are_means_matched(outline, place) for place in places] == [ends, ends]


def perceiver(p, x):
    """Learned queries: their projection reads the same for all images."""
    keys, values = x @ p["k"], x @ p["v"]
    weights = jax.nn.softmax(jnp.einsum("lc,ntc->nlt", p["latents"] @ p["q"], keys), -1)
    return (weights @ values).mean(1) @ p["o"]


def multiplied(p, x):
    return jnp.tanh(x @ (p["a"] @ p["b"])) @ p["o"]


FIXED = {
    perceiver: dict(latents=(5, 12), q=(12, 12), k=(12, 12), v=(12, 12), o=(12, 8)),
    multiplied: dict(a=(12, 12), b=(12, 12), o=(12, 8)),
}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("apply", FIXED)
def test_layers_that_read_no_images_are_decomposed_beside_the_others(apply, steps):
    tree = {name: normal(*shape) / 4 for name, shape in FIXED[apply].items()}
    x = normal(64, 7, 12) if apply is perceiver else normal(64, 12)
    found = calibrate(apply, tree, x)
    chosen = plan(found, macs=0.6)
    small = compress(found, chosen, steps=steps)
    assert not set(chosen.ranks) - {"q", "k", "v", "o", "a", "b"}
    full = {path: 12 for path in ("k", "v") if path in tree} | {"o": 8}
    exact = compress(found, {**full, "q" if apply is perceiver else "b": 12}, steps=steps)
    # The shrinkage of the fits, over a softmax.
    assert relative(lowrank(apply)(exact, x), apply(tree, x)) < 1e-2
    assert relative(lowrank(apply)(small, x), apply(tree, x)) < 1
