"""Compression with data: exact at full rank, closer than plain factors below, for any program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Tucker, calibrate, compress, decompose, lowrank, max_rank, plan
from lowrank_jax.compression import holding, outline
from lowrank_jax.factorization.forms import SCHEMES


def images(count=32, seed=0, size=10):
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    x = np.random.default_rng(seed).standard_normal((count, size, size, 4))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 2
    return jnp.asarray(x, jnp.float32)


class Net(nn.Module):
    """Strided, grouped and circular convolutions, with and without normalisation and bias."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(True)(nn.Conv(8, (3, 3), 2, use_bias=False, name="strided")(x)))
        x = nn.relu(nn.Conv(8, (3, 5), padding="CIRCULAR", name="circular")(x))
        grouped = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")
        x = nn.relu(nn.BatchNorm(True)(grouped(x)))
        return nn.Dense(3)(x.mean((1, 2)))


def trained(model, x):
    """Random variables whose normalisations fit the data, as after training."""
    variables = model.init(jax.random.key(0), x)
    rng = np.random.default_rng(1)

    def noisy(leaf):
        return leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape) ** 2, leaf.dtype)

    return jax.tree.map(noisy, variables)


SHAPES = {"strided": (3, 3, 4, 8), "circular": (3, 5, 8, 8), "grouped": (3, 3, 4, 8)}
CUT = {"strided": 3, "circular": 5, "grouped": 2}


def scheme(path, rank=None, first="vertical"):
    groups = 2 if path == "grouped" else 1
    rank = rank or max_rank(SHAPES[path], groups, first=first)
    return SCHEMES[first](rank, groups, first=first)


def gap(apply, variables, small, x):
    dense, low = apply(variables, x), lowrank(apply)(small, x)
    return float(jnp.linalg.norm(low - dense) / jnp.linalg.norm(dense))


@pytest.mark.parametrize(
    "first, match",
    [("vertical", True), ("horizontal", False), ("spatial", True), ("pointwise", False)],
)
def test_at_full_rank_the_network_computes_what_it_did(first, match):
    x = images()
    variables = trained(Net(), x)
    ranks = {path: scheme(path, first=first) for path in SHAPES} | {"Dense_0": 3}
    small = compress(Net().apply, variables, x, ranks, match_means=match)
    # The shrinkage and float32, over three layers.
    assert gap(Net().apply, variables, small, images(seed=7)) < 1e-3


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"]
)
def test_it_is_closer_than_plain_factors_on_other_images(wrap):
    x, other = images(128), images(seed=7)
    variables, apply = trained(Net(), x), wrap(Net().apply)
    small = compress(apply, variables, x, CUT, sweeps=0 if wrap is jax.jit else 1)
    plain = decompose(variables, {path: scheme(path, rank) for path, rank in CUT.items()})
    assert gap(apply, variables, small, other) < 0.7 * gap(apply, variables, plain, other)


@pytest.mark.slow
def test_three_factors_are_fitted_in_their_place_and_closer_than_plain_ones():
    x, other, apply = images(64), images(seed=7), Net().apply
    variables = trained(Net(), x)
    table = {"strided": Tucker(2, inner=4), "grouped": Tucker(3, 2, inner=3)}
    small, fits = compress(apply, variables, x, table, return_fits=True)
    plain = decompose(variables, table)
    chex.assert_trees_all_equal_shapes_and_dtypes(small, plain)
    assert not any(own[()].is_plain for own in fits.values())
    assert gap(apply, variables, small, other) < 0.7 * gap(apply, variables, plain, other)


def test_the_result_has_the_tree_of_decompose_and_leaves_other_leaves_alone():
    x = images()
    variables = trained(Net(), x)
    small = compress(Net().apply, variables, x, {"circ.*": 5})
    wanted = decompose(variables, {"circular": 5})
    chex.assert_trees_all_equal_shapes_and_dtypes(small, wanted)
    assert small["params"]["strided"]["kernel"] is variables["params"]["strided"]["kernel"]
    norm = "BatchNorm_0"
    chex.assert_trees_all_equal(small["batch_stats"][norm], variables["batch_stats"][norm])


def kept(module, _):
    return module.name in ("BatchNorm_0", "circular", "BatchNorm_1")


def test_the_means_behind_each_normalisation_and_each_bias_are_those_of_the_dense_network():
    x = images(64)
    variables = trained(Net(), x)
    small = compress(Net().apply, variables, x, CUT)
    dense = Net().apply(variables, x, capture_intermediates=kept)[1]["intermediates"]
    low = lowrank(Net().apply)(small, x, capture_intermediates=kept)[1]["intermediates"]
    loose = compress(Net().apply, variables, x, CUT, match_means=False)
    free = lowrank(Net().apply)(loose, x, capture_intermediates=kept)[1]["intermediates"]
    for name in ("BatchNorm_0", "circular", "BatchNorm_1"):
        values = (tree[name]["__call__"][0] for tree in (dense, low, free))
        one, two, left = (nn.relu(value).mean((0, 1, 2)) for value in values)
        # Half of the images against the other half leave a share of the difference to noise.
        assert jnp.linalg.norm(two - one) < 0.6 * jnp.linalg.norm(left - one)


@pytest.mark.parametrize("numbers", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_means_are_matched_where_a_model_runs_image_by_image(numbers):
    """Under ``vmap`` axes of size one come and go between a layer and its bias."""
    axis = numbers[0].index("C") - 1

    def one(tree, image):
        y = jax.lax.conv_general_dilated(
            image[None], tree["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )
        return y[0] + jnp.expand_dims(tree["bias"], [i for i in range(3) if i != axis])

    def apply(tree, x):
        return jax.vmap(one, (None, 0))(tree, x)

    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
    tree = {
        "kernel": kernel.transpose(["HWIO".index(letter) for letter in numbers[1]]),
        "bias": jnp.zeros(8),
    }
    x = jnp.moveaxis(1 + images(64), 3, axis + 1)
    small = compress(apply, tree, x, {"kernel": 3})
    rest = tuple(i for i in range(4) if i != axis + 1)
    lack, unmatched = (
        jnp.abs((apply(tree, x) - lowrank(apply)(own, x)).mean(rest)).max()
        for own in (small, small | {"bias": tree["bias"]})
    )
    # One half of the images gives the means for the other.
    assert lack < 0.2 * unmatched


def test_means_that_are_not_to_be_matched_stay():
    x = images()
    variables = trained(Net(), x)
    small = compress(Net().apply, variables, x, CUT, match_means=False)
    chex.assert_trees_all_equal(small["batch_stats"], variables["batch_stats"])
    assert small["params"]["circular"]["bias"] is variables["params"]["circular"]["bias"]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Conv(4, (3, 3), name="inner")(x)), None


STACKED = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scan", "jit", "vmap"])
def test_layers_in_lifted_transformations_are_fitted(kind):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            if kind == "vmap":
                split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
                many = nn.vmap(nn.Conv, in_axes=None, axis_size=2, **split)
                return jnp.tanh(many(4, (3, 3), name="block")(x)).mean(0)
            block = nn.scan(Block, **STACKED) if kind == "scan" else nn.jit(Block)
            return block(name="block")(x, None)[0]

    x, other = images(128), images(seed=7)
    variables = trained(Model(), x)
    path = "block" if kind == "vmap" else "block/inner"
    small, fits = compress(Model().apply, variables, x, {path: 4}, return_fits=True)
    plain = decompose(variables, {path: 4})
    assert set(fits[path]) == ({()} if kind == "jit" else {(0,), (1,)})
    assert gap(Model().apply, variables, small, other) < gap(Model().apply, variables, plain, other)


def test_layers_within_branches_get_the_plain_factors():
    def apply(tree, x):
        numbers = ("NHWC", "HWIO", "NHWC")

        def convolve(x):
            return jax.lax.conv_general_dilated(
                x, tree["kernel"], (1, 1), "SAME", dimension_numbers=numbers
            )

        return jax.lax.cond(x.sum() > -jnp.inf, convolve, lambda x: x, x)

    tree = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 4))}
    small = compress(apply, tree, images(), {"kernel": 4})
    chex.assert_trees_all_close(small, decompose(tree, {"kernel": 4}), atol=1e-5)


def test_a_layer_read_twice_is_fitted_once():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Conv(4, (3, 3), name="layer")
            return layer(nn.relu(layer(x)))

    x = images()
    variables = Model().init(jax.random.key(0), x)
    small = compress(Model().apply, variables, x, {"layer": max_rank((3, 3, 4, 4))})
    assert gap(Model().apply, variables, small, images(seed=7)) < 1e-3


def pairs_along_the_batch(tree, a, b):
    """Both images of a pair run through one layer, side by side along the batch."""
    both = nn.Conv(8, (3, 3)).apply({"params": tree["pair"]}, jnp.concatenate([a, b]))
    one, two = jnp.split(jnp.tanh(both), 2)
    return nn.Conv(8, (3, 3)).apply({"params": tree["last"]}, one - two)


def frames_first(tree, video):
    """Frames of all videos, folded into the batch with the time first."""
    n, t = video.shape[:2]
    frames = video.swapaxes(0, 1).reshape(t * n, *video.shape[2:])
    found = jnp.tanh(nn.Conv(8, (3, 3)).apply({"params": tree["pair"]}, frames))
    means = found.reshape(t, n, *found.shape[1:]).mean(0)
    return nn.Conv(8, (3, 3)).apply({"params": tree["last"]}, means)


@pytest.mark.parametrize("apply", [pairs_along_the_batch, frames_first])
def test_a_model_that_reorders_its_batch_is_fitted_to_its_own_images(apply):
    layer, x = nn.Conv(8, (3, 3)), images(64)
    tree = {"pair": layer.init(jax.random.key(0), x)["params"]}
    tree["last"] = layer.init(jax.random.key(1), jnp.zeros((1, 8, 8, 8)))["params"]

    def inputs(seed):
        one, two = images(64, seed), images(64, seed + 1)
        return (one, two) if apply is pairs_along_the_batch else (jnp.stack([one, two], 1),)

    small = compress(apply, tree, inputs(0), {".*": 4})
    plain = decompose(tree, {"pair": 4, "last": 4})
    dense, fitted, cut = (lowrank(apply)(t, *inputs(7)) for t in (tree, small, plain))
    assert jnp.linalg.norm(fitted - dense) < 0.9 * jnp.linalg.norm(cut - dense)


@pytest.mark.parametrize("name", ["one call", "dict", "generator"])
def test_every_form_of_inputs_gives_the_same_factors(name):
    layer, x = nn.Sequential([nn.Conv(8, (3, 3))]), images(16)
    variables = layer.init(jax.random.key(0), x)

    def keyed(variables, batch):
        return layer.apply(variables, batch["x"])

    given = {
        "one call": (layer.apply, x),
        "dict": (keyed, {"x": x}),
        "generator": (layer.apply, (x[i : i + 8] for i in (0, 8))),
    }[name]
    small = compress(given[0], variables, given[1], {"layers_0": 3})
    wanted = compress(layer.apply, variables, [x[:8], x[8:]], {"layers_0": 3})
    chex.assert_trees_all_close(small, wanted, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 3])
def test_activations_in_files_give_the_same_factors(steps, monkeypatch):
    layer, x = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(4, (3, 3))]), images(16)
    variables = layer.init(jax.random.key(0), x)
    table = {"layers_0": 3, "layers_2": 2}
    wanted = compress(layer.apply, variables, [x[:8], x[8:]], table, steps=steps)
    monkeypatch.setattr("lowrank_jax.compression.holding.IN_MEMORY", 0)
    found = compress(layer.apply, variables, [x[:8], x[8:]], table, steps=steps)
    chex.assert_trees_all_equal(found, wanted)


class Shortcut(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(7, (3, 3))(x)
        return x + nn.Conv(7, (3, 3))(nn.relu(nn.Conv(5, (3, 3))(nn.relu(x))))


def test_a_value_that_stays_alive_is_written_once(monkeypatch):
    x, written, append = images(8), [], holding._File.append
    monkeypatch.setattr(holding, "IN_MEMORY", 0)
    monkeypatch.setattr(
        holding._File, "append", lambda file, x: written.append(x.shape[-1]) or append(file, x)
    )
    variables = Shortcut().init(jax.random.key(0), x)
    compress(Shortcut().apply, variables, [x[:4], x[4:]], {"Conv_1": 2, "Conv_2": 2})
    # Of each of two batches: the shortcut, its activation, and the outputs of the last layer.
    assert written.count(7) == 2 * 3


def test_layers_of_too_many_inputs_have_plain_factors(monkeypatch, caplog):
    monkeypatch.setattr(outline, "WIDEST", 40)  # "circular" has 120
    x, apply = images(64), Net().apply
    variables = trained(Net(), x)
    ranks = {"strided": 3, "circular": 5}
    small, fits = compress(apply, variables, x, ranks, return_fits=True)
    assert set(fits) == {"strided"} and "circular has plain factors: more than 40" in caplog.text
    plain = decompose(variables, {"circular": 5})["params"]["circular"]["kernel"]
    chex.assert_trees_all_close(small["params"]["circular"]["kernel"], plain, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_have_the_type_of_the_kernel(dtype):
    layer, x = nn.Sequential([nn.Conv(8, (3, 3), param_dtype=jnp.dtype(dtype))]), images()
    variables = layer.init(jax.random.key(0), x)
    small = compress(layer.apply, variables, x, {"layers_0": 3})
    chex.assert_type(jax.tree.leaves(small["params"]), jnp.dtype(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 16])
def test_few_images_are_never_worse_than_plain_factors(count):
    variables = trained(Net(), images())
    plain = decompose(variables, {path: scheme(path, rank) for path, rank in CUT.items()})
    ratios = []
    for seed in range(3):
        other = images(64, seed=70 + seed)
        small, fits = compress(Net().apply, variables, images(count, seed), CUT, return_fits=True)
        gaps = [gap(Net().apply, variables, tree, other) for tree in (small, plain)]
        ratios.append(gaps[0] / gaps[1])
        every = [fit for own in fits.values() for fit in own.values()]
        assert all(fit.held_out <= fit.plain for fit in every)
    # Two images of noise, one held against the other, are off by some.
    assert np.median(ratios) <= 1 + 1e-5 and max(ratios) < 1.5


@pytest.mark.slow
def test_one_calibration_serves_every_plan_and_fit():
    x = images()
    variables = trained(Net(), x)
    found = calibrate(Net().apply, variables, x)
    for share in (0.5, 0.7):
        one, two = plan(found, macs=share), plan(Net().apply, variables, x, macs=share)
        assert one == two
        chex.assert_trees_all_close(compress(found, one), compress(Net().apply, variables, x, two))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"ranks": {"strided": 99}}, "strided: rank 99 is not allowed"),
        ({"ranks": {"stride": 2}}, "did you mean 'strided'"),
        ({"ranks": {}}, "table of ranks is empty"),
        ({"sweeps": 0.5}, "sweeps=0.5 is not allowed"),
        ({"images": jnp.full((2, 10, 10, 4), jnp.nan)}, "strided: the activations hold NaN"),
        ({"images": jnp.zeros((0, 10, 10, 4))}, "No calibration data"),
        ({"images": jnp.zeros((2, 10, 10, 3))}, r"does not run on inputs \(1, 10, 10, 3\)"),
        ({"train": True}, "as it runs in evaluation"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_what_cannot_be_used_is_refused(change, text):
    variables = trained(Net(), images())
    given = {"images": images(), "ranks": {"strided": 2}} | change
    with pytest.raises(ValueError, match=text):
        compress(Net().apply, variables, given.pop("images"), given.pop("ranks"), **given)


def test_a_decomposed_tree_is_not_compressed_again():
    x = images()
    small = decompose(trained(Net(), x), {"strided": 2})
    with pytest.raises(ValueError, match="strided is decomposed already"):
        compress(Net().apply, small, x, {"circular": 2})
