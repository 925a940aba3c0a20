"""Layers that stay dense are fitted, too, and make up for the errors of those before them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Channel, Matrix, compress, lowrank
from lowrank_jax.compression import outline


def images(count, seed=0, channels=4):
    """Smooth random images."""
    x = np.random.default_rng(seed).standard_normal((count, 8, 8, channels))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 2
    return jnp.asarray(x, jnp.float32)


def inverted():
    """An expansion, a depthwise convolution and a projection, as a MobileNet has."""
    parts = [nn.Conv(16, (1, 1)), nn.relu6, nn.Conv(16, (3, 3), feature_group_count=16)]
    return nn.Sequential([*parts, nn.relu6, nn.Conv(8, (1, 1))]), {"layers_0": 2}


def grouped():
    first = nn.Conv(12, (3, 3), feature_group_count=2)
    later = nn.Conv(12, (3, 3), strides=2, feature_group_count=3)
    return nn.Sequential([first, nn.gelu, later, nn.relu, nn.Dense(6)]), {"layers_0": 4}


def products():
    parts = [nn.Dense(24), nn.gelu, nn.DenseGeneral((4, 6)), nn.gelu]
    last = nn.DenseGeneral(5, axis=(-2, -1))
    return nn.Sequential([*parts, last]), {"layers_0": Matrix(2)}


def one_dimensional():
    flat = lambda x: x.reshape(len(x), 64, -1)  # noqa: E731
    parts = [flat, nn.Conv(12, (5,)), nn.relu, nn.ConvTranspose(6, (3,), strides=(2,)), nn.relu]
    return nn.Sequential([*parts, nn.Conv(4, (3,))]), {"layers_1": Channel(4, axes="WIO")}


NETWORKS = [inverted, grouped, products, one_dimensional]
both = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)


def made(network, dtype=jnp.float32):
    model, table = network()
    variables = jax.jit(model.init)(jax.random.key(0), images(2))
    return model, jax.tree.map(lambda x: x.astype(dtype), variables), table


def error(model, variables, small, x):
    """Of the outputs, relative to their variance."""
    wanted, found = model.apply(variables, x), lowrank(model.apply)(small, x)
    wanted, found = (np.asarray(own, np.float64) for own in (wanted, found))
    return np.sum((found - wanted) ** 2) / np.sum((wanted - wanted.mean(0)) ** 2)


@both
def test_errors_on_other_images_are_smaller(network):
    model, variables, table = made(network)
    x, fresh = images(256), images(256, seed=1)
    kept, fitted = (
        error(model, variables, compress(model.apply, variables, x, table, fit_dense=own), fresh)
        for own in (False, True)
    )
    assert fitted < 0.97 * kept


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_layers_keep_their_shape_and_type(network, dtype):
    model, variables, table = made(network, dtype)
    small = compress(model.apply, variables, images(64), table)
    plain = compress(model.apply, variables, images(64), table, fit_dense=False)
    chex.assert_trees_all_equal_shapes_and_dtypes(small, plain)
    chex.assert_tree_all_finite(small)


@both
def test_without_the_fit_dense_kernels_stay(network):
    model, variables, table = made(network)
    small = compress(model.apply, variables, images(64), table, fit_dense=False)["params"]
    own, old = (
        {name: x["kernel"] for name, x in tree.items()} for tree in (small, variables["params"])
    )
    kept = set(old) - set(table)
    chex.assert_trees_all_equal({n: own[n] for n in kept}, {n: old[n] for n in kept})


@both
def test_the_fits_that_are_returned_are_of_the_table(network):
    model, variables, table = made(network)
    _, fits = compress(model.apply, variables, images(64), table, return_fits=True)
    assert set(fits) == set(table)


@both
def test_gradient_steps_train_dense_layers_along(network):
    model, variables, table = made(network)
    given = [images(32, seed) for seed in range(4)]
    small, fits = compress(model.apply, variables, given, table, steps=40, return_fits=True)
    plain = compress(model.apply, variables, given, table)
    chex.assert_trees_all_equal_shapes_and_dtypes(small, plain)
    (fit,) = (fit for own in fits.values() for fit in own.values())
    assert fit.stepped <= fit.closed
    x = images(128, seed=9)
    assert error(model, variables, small, x) < 1.1 * error(model, variables, plain, x)


def test_layers_before_the_first_decomposed_one_stay():
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3)), nn.relu, nn.Dense(3)])
    variables = jax.jit(model.init)(jax.random.key(0), images(2))
    small = compress(model.apply, variables, images(64), {"layers_2": 4})["params"]
    old = variables["params"]
    chex.assert_trees_all_equal(small["layers_0"]["kernel"], old["layers_0"]["kernel"])
    assert bool(jnp.any(small["layers_4"]["kernel"] != old["layers_4"]["kernel"]))


def test_kernels_that_are_read_twice_or_otherwise_stay():
    def apply(tree, x):
        x = jax.nn.relu(x @ tree["first"])
        x = jax.nn.relu(x @ tree["twice"]) @ tree["twice"]
        return x @ tree["tied"] + tree["tied"].sum()

    shapes = {"first": (4, 8), "twice": (8, 8), "tied": (8, 5)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    normal = jax.random.normal
    tree = {n: normal(key, shape) for key, (n, shape) in zip(keys, shapes.items(), strict=True)}
    small = compress(apply, tree, images(64), {"first": Matrix(2)})
    for name in ("twice", "tied"):
        chex.assert_trees_all_equal(small[name], tree[name])


def test_kernels_that_the_program_changes_stay():
    def apply(tree, x):
        x = jax.nn.relu(x @ tree["first"])
        return x @ (tree["normed"] / jnp.linalg.norm(tree["normed"], axis=0))

    one, two = jax.random.normal(jax.random.key(0), (2, 8, 8))
    tree = {"first": one[:4], "normed": two}
    small = compress(apply, tree, images(64), {"first": Matrix(2)})
    chex.assert_trees_all_equal(small["normed"], two)


def test_a_kernel_that_the_program_gives_back_stays():
    def apply(tree, x):
        return jax.nn.relu(x @ tree["first"]) @ tree["given"], tree["given"]

    one, two = jax.random.normal(jax.random.key(0), (2, 8, 8))
    tree = {"first": one[:4], "given": two}
    small = compress(apply, tree, images(64), {"first": Matrix(2)})
    chex.assert_trees_all_equal(small["given"], two)


@pytest.mark.parametrize("sizes, stays", [((8, 12), True), ((12, 8), True), ((8, 8), False)])
def test_wide_layers_stay(sizes, stays, monkeypatch):
    monkeypatch.setattr(outline, "KEPT", 10)
    inner, outputs = sizes
    model = nn.Sequential([nn.Dense(inner), nn.relu, nn.Dense(outputs)])
    variables = jax.jit(model.init)(jax.random.key(0), images(2))
    small = compress(model.apply, variables, images(64), {"layers_0": Matrix(2)})
    old, new = (tree["params"]["layers_2"]["kernel"] for tree in (variables, small))
    assert bool(jnp.all(old == new)) == stays
