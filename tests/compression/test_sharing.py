"""A kernel that is used several times is fitted to all of its uses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Channel, Separable, compress, decompose, lowrank, trace

ROUNDING = 1e-4  # relative; the moments of the uses are added in another order


class Heads(nn.Module):
    """One convolution over two maps, in an order."""

    order: tuple = ("one", "two")
    biases: bool = False

    @nn.compact
    def __call__(self, maps):
        head = nn.Conv(24, (3, 3), use_bias=not self.biases, name="head")
        norms = {name: nn.BatchNorm(True, name=f"norm_{name}") for name in sorted(maps)}
        found = {}
        for name in self.order:
            y = head(maps[name])
            found[name] = nn.relu(norms[name](y) if self.biases else y).mean((1, 2))
        return found


def smooth(count, channels, seed):
    x = np.random.default_rng(seed).standard_normal((count, 8, 8, channels))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis)) / 2
    return x.astype(np.float32)


def maps(seed, count=64):
    """Two maps, the first of which has most of its energy in few channels."""
    few = np.where(np.arange(16) < 5, 1, 0.02).astype(np.float32)
    return {"one": smooth(count, 16, seed) * few, "two": smooth(count, 16, seed + 50)}


def gap(apply, variables, small, x):
    """The relative error of all outputs, about their means."""
    pairs = zip(*map(jax.tree.leaves, (lowrank(apply)(small, x), apply(variables, x))), strict=True)
    rows = [(float(np.sum((y - t) ** 2)), float(np.sum((t - t.mean(0)) ** 2))) for y, t in pairs]
    return np.sqrt(np.sum(rows, 0)[0] / np.sum(rows, 0)[1])


@pytest.mark.parametrize("biases", [False, True], ids=["one bias", "a normalisation each"])
@pytest.mark.parametrize("scheme", [Channel(6), Separable(12)])
def test_the_order_of_the_uses_does_not_matter_and_all_gain(scheme, biases):
    networks = [Heads(order, biases) for order in (("one", "two"), ("two", "one"))]
    variables = jax.jit(networks[0].init)(jax.random.key(0), maps(0, 1))
    table = {"head": scheme}
    one, two = (compress(net.apply, variables, maps(1), table) for net in networks)
    chex.assert_trees_all_close(*map(merged, (one, two)), rtol=ROUNDING, atol=ROUNDING)
    apply, plain = networks[0].apply, decompose(variables, table)
    for seed in (1, 9):
        fitted, other = (gap(apply, variables, tree, maps(seed)) for tree in (one, plain))
        assert fitted < 0.95 * other


def merged(small):
    """Factors have signs of their own; their product has none."""
    one, two = jax.tree.leaves(small["params"]["head"]["kernel"])
    return [jnp.abs(one).sum(), jnp.abs(two).sum(), small["params"]["head"].get("bias", 0)]


def test_a_layer_after_itself_is_better_than_plain():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Conv(16, (3, 3), name="layer")
            return nn.relu(layer(nn.relu(layer(x)))).mean((1, 2))

    few = np.where(np.arange(16) < 5, 1, 0.02).astype(np.float32)
    x, other = smooth(64, 16, 1) * few, smooth(64, 16, 2) * few
    variables, table = jax.jit(Twice().init)(jax.random.key(0), x[:1]), {"layer": 12}
    apply, plain = Twice().apply, decompose(variables, table)
    small = compress(apply, variables, x, table)
    assert gap(apply, variables, small, other) < gap(apply, variables, plain, other)


def test_a_recurrence_of_many_steps_is_fitted_to_a_few_of_them():
    def apply(tree, x):
        state = jnp.zeros((len(x), 12))
        for step in range(x.shape[1]):
            state = jnp.tanh(x[:, step] @ tree["in"] + state @ tree["on"])
        return state

    rng = np.random.default_rng(0)
    tree = {name: 0.5 * rng.standard_normal((12, 12)).astype("f") for name in ("in", "on")}
    x, other = (rng.standard_normal((64, 9, 12)).astype("f") for _ in range(2))
    x, other = (np.where(np.arange(12) < 4, a, 0.05 * a).astype("f") for a in (x, other))
    table = {"in": 4, "on": 8}
    small, plain = compress(apply, tree, x, table), decompose(tree, table)
    assert gap(apply, tree, small, other) < gap(apply, tree, plain, other)


@pytest.mark.parametrize("order", [(8, 12), (8, 12, 12, 8), (8, 8, 12)])
def test_batches_may_be_images_of_several_sizes(order):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (12, 16):
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            return nn.Dense(5)(x.mean((1, 2)))

    def batch(size, seed):
        return np.tile(smooth(16, 4, seed), (1, 2, 2, 1))[:, :size, :size]

    batches = [batch(size, seed) for seed, size in enumerate(order)]
    variables = jax.jit(Net().init)(jax.random.key(0), batches[0][:1])
    table = {"Conv_1": Separable(5)}
    small, plain = compress(Net().apply, variables, batches, table), decompose(variables, table)
    for other in (batch(8, 20), batch(12, 21)):
        assert gap(Net().apply, variables, small, other) < gap(Net().apply, variables, plain, other)


# Where a kernel is read twice, with what takes up the means behind none, one or both of the reads.
BIASES = {
    "first": lambda t, x: jnp.tanh(jnp.tanh(x @ t["a"] + t["b"]) @ t["a"]),
    "second": lambda t, x: jnp.tanh(jnp.tanh(x @ t["a"]) @ t["a"] + t["b"]),
    "each": lambda t, x: jnp.tanh(jnp.tanh(x @ t["a"] + t["b"]) @ t["a"] + t["c"]),
    "none": lambda t, x: jnp.tanh(jnp.tanh(x @ t["a"]) @ t["a"]),
    "apart": lambda t, x: (nn.relu(x @ t["a"] + t["b"]), x @ t["a"]),
    "subtracted": lambda t, x: jnp.tanh(jnp.tanh(x @ t["a"] - t["b"]) @ t["a"]),
    "summed": lambda t, x: nn.relu(x @ t["a"] + t["b"]) @ t["d"] + x @ t["a"],
}


@pytest.mark.parametrize("where", BIASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_matching_means_never_costs_a_read_that_has_nothing_to_take_them_up(where, seed):
    rng = np.random.default_rng(seed)
    tree = {name: jnp.asarray(rng.normal(size=8) / 3, "float32") for name in "bc"}
    tree |= {name: jnp.asarray(rng.normal(size=(8, 8)) / 3, "float32") for name in "ad"}
    x = jnp.asarray(rng.normal(size=(256, 8)) / 3 + 0.7, "float32")
    apply = BIASES[where]

    def error(tree_or_factors):
        found = jax.tree.leaves(lowrank(apply)(tree_or_factors, x))
        pairs = zip(found, jax.tree.leaves(apply(tree, x)), strict=True)
        rows = [(float(np.sum((y - t) ** 2)), float(np.sum(t**2))) for y, t in pairs]
        return np.sum(rows, 0)[0] / np.sum(rows, 0)[1]

    plain = error(decompose(tree, {"a": 4}, trace=trace(apply, tree, x)))
    matched, other = (
        error(compress(apply, tree, x, {"a": 4}, match_means=match)) for match in (True, False)
    )
    assert matched < 1.05 * other and matched < 0.8 * plain
