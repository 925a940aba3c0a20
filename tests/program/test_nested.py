"""A factor may stand decomposed itself: the tree is read, run, listed and stored like any other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowrank_jax as lr
from lowrank_jax.nnx import Factors
from lowrank_jax.tuning.running import with_algorithms

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X = normal(2, 8, 7, 4)
TREE = {
    "strided": normal(3, 3, 4, 4) / 4,
    "grouped": normal(3, 3, 2, 4) / 3,
    "masked": normal(3, 3, 4, 4) / 4,
    "turned": normal(4, 4, 3, 3) / 4,
    "stack": normal(2, 3, 3, 4, 4) / 4,
    "pair": normal(3, 3, 4, 4) / 4,
}
TABLE = {
    "turned": lr.Tucker(3, axes="OIHW", inner=2),
    "grouped": lr.Tucker(2, 2, inner=2),
    "pair": lr.Separable(3),
    ".*": lr.Tucker(2, inner=3),
}
SMALL = lr.decompose(TREE, TABLE)


def conv(x, kernel, stride=1, groups=1, numbers=NHWC):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def network(tree, x):
    """Layers that run as factors, one that is multiplied back, and one beside a common pair."""
    x = jnp.tanh(conv(x, tree["strided"], 2))
    x = jax.checkpoint(jnp.tanh)(conv(x, tree["grouped"], groups=2))
    x = jnp.tanh(conv(x, tree["masked"] * (jnp.arange(4) != 1)))
    x = jnp.tanh(jax.jit(conv, static_argnums=(2, 3, 4))(x, tree["turned"], 1, 1, TURNED))
    x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(conv(x, kernel)), None), x, tree["stack"])
    return conv(x, tree["pair"])


TURNED = ("NHWC", "OIHW", "NHWC")


def test_values_and_derivatives_are_those_of_the_products():
    def run(apply, tree):
        y, pullback = jax.vjp(apply, tree, X)
        return y, pullback(jnp.cos(y))

    rebuilt = lambda tree, x: network(lr.reconstruct(tree), x)  # noqa: E731
    both = jax.jit(lambda tree: (run(lr.lowrank(network), tree), run(rebuilt, tree)))
    chex.assert_trees_all_close(*both(SMALL), atol=1e-4)


def test_the_trace_lists_three_convolutions_with_their_macs():
    uses = lr.trace(lr.lowrank(network), SMALL, X)
    dense = lr.trace(network, TREE, X)
    scheme = TABLE["grouped"]
    paths = ["pointwise_first", "spatial_second/spatial_first", "spatial_second/pointwise_second"]
    own = [use for use in uses if use.path.startswith("grouped/")]
    assert [use.path for use in own] == [f"grouped/{path}" for path in paths]
    assert sum(use.macs for use in own) == dense.at("grouped")[0].macs_at(scheme)
    assert sum(use.parameters for use in own) == scheme.parameters(TREE["grouped"].shape)
    assert {use.path.partition("/")[0] for use in uses if use.reason} == {"masked", ""}
    assert sum(not use.path for use in uses) == 1  # the masked product


def test_factors_that_a_function_returns_are_still_factors():
    found = jax.jit(lr.lowrank(lambda tree, x: (tree, network(tree, x))))(SMALL, X)[0]
    chex.assert_trees_all_equal(found, SMALL)


def test_a_factor_of_a_factor_of_a_factor_runs():
    inner = SMALL["strided"]["spatial_second"]
    core = lr.decompose({"kernel": inner["spatial_first"]}, {"kernel": 4})["kernel"]
    deep = SMALL["strided"] | {"spatial_second": inner | {"spatial_first": core}}
    run = jax.jit(lr.lowrank(lambda tree, x: conv(x, tree["layer"])))
    wanted = conv(X, lr.reconstruct({"layer": deep})["layer"])
    np.testing.assert_allclose(run({"layer": deep}, X), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["merged", "im2col+convolve"])
def test_algorithms_run_the_factors_of_factors(name):
    def choose(layer, scheme):
        return "convolve" if scheme is None else name

    tree = {"layer": SMALL["strided"]}
    run = jax.jit(with_algorithms(lambda tree, x: conv(x, tree["layer"]), choose))
    wanted = conv(X, lr.reconstruct(tree)["layer"])
    np.testing.assert_allclose(run(tree, X), wanted, atol=1e-5)


@pytest.mark.parametrize("format", ["npz", "safetensors", "msgpack"])
def test_files_keep_them(tmp_path, format):
    lr.save_weights(tmp_path / f"small.{format}", SMALL)
    chex.assert_trees_all_equal(lr.load_weights(tmp_path / f"small.{format}"), SMALL)


def test_other_layers_and_decomposed_ones_are_told_apart():
    with pytest.raises(ValueError, match="'strided' is decomposed already"):
        lr.decompose(SMALL, {"strided": 2})
    misfit = SMALL["strided"] | {"pointwise_first": normal(1, 1, 4, 3)}
    with pytest.raises(ValueError, match=r"layer: factors of shapes .* do not fit together"):
        lr.reconstruct({"layer": misfit})


def test_modules_of_nnx_hold_them():
    model = nnx.Sequential(nnx.Conv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0)), nnx.relu)
    small = lr.nnx.decompose(model, {"layers/0": lr.Tucker(2, inner=3)})
    kernel = small.layers[0].kernel
    assert isinstance(kernel.spatial_second, Factors) and kernel.shape == (3, 3, 4, 8)
    dense = lr.nnx.reconstruct(small)
    np.testing.assert_allclose(dense.layers[0].kernel[...], kernel[...])
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(small, X), dense(X), atol=1e-5)
    assert [use.macs for use in lr.nnx.trace(small, X)] == [896, 1728, 768]


def test_linen_and_nnx_have_the_same_tree():
    variables = {"params": {"kernel": normal(3, 3, 4, 8), "bias": normal(8)}}
    model = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))
    nnx.update(model, variables["params"])
    small = lr.nnx.decompose(nnx.Sequential(model), {"layers/0": lr.Tucker(2, inner=3)})
    tree = lr.decompose(variables, {"kernel": lr.Tucker(2, inner=3)})["params"]
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(small.layers[0])), tree)
