"""Gradient steps without labels: blocks come closer to the dense ones, or keep the closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Tucker, calibrate, compress, decompose, lowrank, trace
from lowrank_jax.calibration.network import Network
from lowrank_jax.compression import reconstruction
from lowrank_jax.compression.blocks import block_ends
from lowrank_jax.compression.descent import descend
from lowrank_jax.compression.outline import Outline, fit_places
from lowrank_jax.compression.stepping import stepped
from lowrank_jax.factorization.separable import Separable

STEPS = 20


def images(count=64, seed=0):
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    x = np.random.default_rng(seed).standard_normal((count, 6, 6, 4))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis)) / 2
    return jnp.asarray(x, jnp.float32)


def batches(count=64, seed=0):
    return jnp.split(images(count, seed), 4)


class Residual(nn.Module):
    """A stem, a residual block with normalisations, a plain layer and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        y = nn.relu(nn.BatchNorm(True)(nn.Conv(8, (3, 3), name="one")(x)))
        y = nn.BatchNorm(True)(nn.Conv(8, (3, 3), name="two")(y))
        x = nn.relu(nn.Conv(8, (3, 3), name="plain")(nn.relu(x + y)))
        return nn.Dense(3)(x.mean((1, 2)))


RANKS = {"one": 3, "two": 3, "plain": 3}


def gap(apply, variables, small, x):
    dense, low = apply(variables, x), lowrank(apply)(small, x)
    return float(jnp.linalg.norm(low - dense) / jnp.linalg.norm(dense))


def every(fits):
    return [fit for own in fits.values() for fit in own.values()]


def residual():
    return Residual().apply, Residual().init(jax.random.key(0), images()), RANKS


def plain_function():
    def apply(tree, x):
        return jnp.tanh(jnp.tanh(x @ tree["one"]) @ tree["two"]).mean((1, 2))

    keys = jax.random.split(jax.random.key(0))
    one, two = jax.random.normal(keys[0], (4, 8)), jax.random.normal(keys[1], (8, 6))
    return apply, {"one": one, "two": two}, {"one": 2, "two": 3}


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Conv(4, (3, 3), name="inner")(x)), None


def stack():
    lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Layer, **lifted)(name="block")(x, None)[0]

    return Model().apply, Model().init(jax.random.key(0), images()), {"block/inner": 3}


def nested():
    model = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(6, (3, 3)), nn.relu])
    variables = model.init(jax.random.key(0), images())
    return model.apply, variables, {"layers_0": Tucker(3, inner=4)}


def standardised():
    def apply(tree, x):
        kernel = tree["kernel"] - tree["kernel"].mean((0, 1, 2))
        kernel = kernel / jnp.sqrt(kernel.var((0, 1, 2)) + 1e-5)
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(x) @ tree["last"]

    one, two = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, 3, 4, 8), (8, 6)])
    )
    return apply, {"kernel": one, "last": two}, {"kernel": 3}


def half_precision():
    apply, tree, table = plain_function()
    return apply, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree), table


NETWORKS = [residual, plain_function, stack, nested, standardised, half_precision]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_no_block_gets_worse_and_the_tree_is_that_of_decompose(network):
    apply, variables, table = network()
    given = batches(128)
    small, fits = compress(apply, variables, given, table, steps=3 * STEPS, return_fits=True)
    plain = decompose(variables, table, trace(apply, variables, given[0]))
    chex.assert_trees_all_equal_shapes_and_dtypes(small, plain)
    assert all(fit.stepped <= fit.closed for fit in every(fits))
    assert any(fit.stepped < fit.closed for fit in every(fits))


@pytest.mark.parametrize("network", [residual, stack], ids=lambda net: net.__name__)
def test_the_errors_that_are_noted_are_those_of_the_tree_that_is_returned(network):
    apply, variables, table = network()
    given = batches()
    small, fits = compress(apply, variables, given, table, steps=STEPS, return_fits=True)
    dense = apply(variables, given[-1])  # of fewer than eight batches the last is held out
    error = jnp.mean((lowrank(apply)(small, given[-1]) - dense) ** 2) / jnp.var(dense)
    np.testing.assert_allclose(every(fits)[-1].stepped, error, rtol=1e-3)


@pytest.mark.slow
def test_the_network_is_closer_to_the_dense_one_on_other_images():
    apply, variables, table = residual()
    found = calibrate(apply, variables, batches(256))
    closed, small = (compress(found, table, steps=steps) for steps in (0, 100))
    other = images(64, seed=7)
    assert gap(apply, variables, small, other) < 0.97 * gap(apply, variables, closed, other)


def test_without_steps_nothing_is_noted_and_one_image_cannot_have_any():
    apply, variables, table = residual()
    for x, steps in ((images(8), 0), (images(1), STEPS)):
        fits = compress(apply, variables, x, table, steps=steps, return_fits=True)[1]
        assert all(fit.closed is None and fit.stepped is None for fit in every(fits))


def test_layers_whose_means_are_not_matched_keep_their_shifts():
    apply, variables, table = residual()
    small = compress(apply, variables, batches(), table, steps=STEPS, match_means=False)
    chex.assert_trees_all_equal(small["batch_stats"], variables["batch_stats"])
    chex.assert_trees_all_equal(small["params"]["one"]["bias"], variables["params"]["one"]["bias"])


def ends_in_a_product(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def products_in_a_row(p, x):
    return x @ p["a"] @ p["b"] @ p["c"] + p["shift"]


def two_heads(p, x):
    hidden = jnp.tanh(x @ p["a"])
    return hidden @ p["b"], hidden @ p["c"]


@pytest.mark.parametrize("apply", [ends_in_a_product, products_in_a_row, two_heads])
@pytest.mark.parametrize("paths", ["a", "b", "ab", "abc"])
def test_a_block_may_be_one_product(apply, paths):
    rng = np.random.default_rng(0)
    tree = {name: rng.standard_normal((8, 8)).astype("f") for name in "abc"}
    tree["shift"] = np.zeros(8, np.float32)
    x, table = rng.standard_normal((128, 8)).astype("f"), dict.fromkeys(paths, 3)
    if "c" in paths and apply is ends_in_a_product:
        table.pop("c")
    _, fits = compress(apply, tree, x, table, steps=3, return_fits=True)
    assert set(fits) == set(table)
    assert all(fit.stepped <= fit.closed for fit in every(fits))


def test_a_block_without_a_derivative_keeps_the_closed_form():
    def apply(tree, x):
        x = x @ tree["kernel"]
        return jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x / 2, x)

    tree = {"kernel": jax.random.normal(jax.random.key(0), (4, 8))}
    with pytest.warns(UserWarning, match="All layers count alike"):
        found = calibrate(apply, tree, batches())
    with pytest.warns(UserWarning, match="kernel: no gradient steps"):
        small = compress(found, {"kernel": 2}, steps=STEPS)
    chex.assert_trees_all_equal(small, compress(found, {"kernel": 2}))


def test_the_neighbours_of_a_block_without_a_derivative_keep_their_steps():
    def apply(tree, x):
        for name in sorted(tree):
            x = jnp.tanh(x @ tree[name])
            if name == "b":
                x = jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x / 2, x)
        return x

    rng = np.random.default_rng(0)
    tree = {name: rng.standard_normal((8, 8)).astype("f") for name in "abcd"}
    x = [rng.standard_normal((64, 8)).astype("f") for _ in range(2)]
    with pytest.warns(UserWarning, match="All layers count alike"):
        found = calibrate(apply, tree, x)
    with pytest.warns(UserWarning, match="^b: no gradient steps"):
        _, fits = compress(found, dict.fromkeys("abcd", 4), steps=5, return_fits=True)
    assert {path for path, fit in fits.items() if fit[()].stepped is None} == {"b"}
    assert fits["c"][()].closed == fits["d"][()].closed


def ends_of(apply, variables, paths):
    outline = Outline(Network(apply, variables).program((images(2),)))
    schemes = {path: Separable(2) for path in paths}
    return outline, block_ends(outline, fit_places(outline, schemes))


def test_a_residual_block_is_a_block():
    apply, variables, _ = residual()
    outline, ends = ends_of(apply, variables, RANKS)
    assert len(ends) == 2 and ends[-1] == len(outline.eqns)
    places = [place for place, reading in outline.readings.items() if reading.source.path in RANKS]
    assert [sum(place < end for place in places) for end in ends] == [2, 3]


def test_layers_that_read_one_value_side_by_side_are_one_block():
    def apply(tree, x):
        one = x @ tree["one"]
        return one @ tree["two"] + one @ tree["three"]

    tree = {name: jnp.ones((4, 4)) for name in ("one", "two", "three")}
    outline, ends = ends_of(apply, tree, ["one", "two", "three"])
    assert ends == [sorted(outline.readings)[1], len(outline.eqns)]


def test_three_blocks_take_their_steps_together(monkeypatch):
    def apply(tree, x):
        for name in sorted(tree):
            x = jnp.tanh(x @ tree[name])
        return x

    rng, counts = np.random.default_rng(0), []
    tree = {name: rng.standard_normal((8, 8)).astype("f") for name in "abcd"}

    def counted(loss, start, given, steps):
        counts.append((set(start.factors), steps))
        return stepped(loss, start, given, steps)

    monkeypatch.setattr(reconstruction, "stepped", counted)
    x = rng.standard_normal((128, 8)).astype("f")
    _, fits = compress(apply, tree, x, dict.fromkeys("abcd", 4), steps=5, return_fits=True)
    assert counts == [({"a", "b", "c"}, 15), ({"d"}, 5)]
    errors = {path: (fit[()].closed, fit[()].stepped) for path, fit in fits.items()}
    assert errors["a"] == errors["b"] == errors["c"] != errors["d"]


def squared(arrays, target):
    return jnp.sum((arrays["x"] - target) ** 2)


@pytest.mark.parametrize("held", [2.0, 0.0], ids=["alike", "unlike"])
def test_steps_are_kept_only_where_they_help_on_what_they_do_not_see(held):
    start = {"x": jnp.ones(3)}
    targets = [jnp.full(3, 2.0)] * 7 + [jnp.full(3, held)]
    found = descend(squared, start, targets, 50)
    assert found.before == pytest.approx(3) and found.after <= found.before
    assert (found.arrays is start) == (held == 0)


def test_steps_that_do_not_end_are_dropped():
    start = {"x": jnp.ones(3)}
    found = descend(lambda arrays, _: jnp.sum(jnp.sqrt(1 - arrays["x"])), start, [0.0, 1.0], 3)
    assert found.arrays is start and found.after == found.before == 0


@pytest.mark.parametrize("steps", [0, STEPS])
def test_the_same_call_gives_the_same_bits(steps):
    apply, variables, ranks = residual()
    one, two = (compress(apply, variables, batches(), ranks, steps=steps) for _ in range(2))
    chex.assert_trees_all_equal(one, two)


@pytest.mark.parametrize("steps", [-1, 0.5, True, "200"])
def test_steps_that_are_no_count_are_refused(steps):
    apply, variables, table = residual()
    with pytest.raises(ValueError, match=f"steps={steps!r} is not allowed; give an int"):
        compress(apply, variables, images(8), table, steps=steps)
