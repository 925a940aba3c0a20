"""Compression with data: exact at full rank, closer than the plain SVD below it, for any Linen
model."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Separable, decompose, lowrank, max_rank, plan, reconstruct
from lowrank_jax.compression.compressing import compress


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
        x = nn.relu(
            nn.BatchNorm(True)(nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x))
        )
        return nn.Dense(3)(x.mean((1, 2)))


def trained(model, x):
    """Random variables whose normalisations fit the data, as after training."""
    variables = model.init(jax.random.key(0), x)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape) ** 2), variables
    )


FULL = {
    "strided": max_rank((3, 3, 4, 8)),
    "circular": max_rank((3, 5, 8, 8)),
    "grouped": max_rank((3, 3, 4, 8), 2),
}
CUT = {"strided": 3, "circular": 5, "grouped": 2}


def gap(model, variables, small, x):
    dense, low = model.apply(variables, x), lowrank(model.apply)(small, x)
    return float(jnp.linalg.norm(low - dense) / jnp.linalg.norm(dense))


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
@pytest.mark.parametrize("batch_norm", ["mean", "keep"])
def test_at_full_rank_the_network_computes_what_it_did(first, batch_norm):
    x = images()
    variables = trained(Net(), x)
    groups = {"grouped": 2}
    ranks = {path: Separable(rank, groups.get(path, 1), first=first) for path, rank in FULL.items()}
    ranks["circular"] = Separable(max_rank((3, 5, 8, 8), first=first), first=first)
    ranks["grouped"] = Separable(max_rank((3, 3, 4, 8), 2, first=first), 2, first=first)
    ranks["strided"] = Separable(max_rank((3, 3, 4, 8), first=first), first=first)
    small = compress(Net().apply, variables, x, ranks, batch_norm=batch_norm)
    assert (
        gap(Net(), variables, small, images(seed=7)) < 1e-3
    )  # the shrinkage and float32, over three layers


@pytest.mark.parametrize("sweeps", [0, 2])
def test_it_is_closer_than_the_plain_svd_on_other_images(sweeps):
    x = images(128)
    variables = trained(Net(), x)
    small = compress(Net().apply, variables, x, CUT, sweeps=sweeps)
    schemes = {path: Separable(rank, 2 if path == "grouped" else 1) for path, rank in CUT.items()}
    plain = {**variables, "params": decompose(variables["params"], schemes)}
    assert gap(Net(), variables, small, images(seed=7)) < 0.7 * gap(
        Net(), variables, plain, images(seed=7)
    )


def test_the_result_has_the_tree_of_decompose_and_leaves_other_leaves_alone():
    x = images()
    variables = trained(Net(), x)
    small = compress(Net().apply, variables, x, {"circular": 5})
    chex.assert_trees_all_equal_shapes_and_dtypes(
        small["params"], decompose(variables["params"], {"circular": 5})
    )
    assert small["params"]["strided"]["kernel"] is variables["params"]["strided"]["kernel"]
    chex.assert_trees_all_equal(
        small["batch_stats"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"]
    )


@pytest.mark.parametrize("batch_norm", ["mean", "full"])
def test_the_means_after_each_normalisation_and_each_bias_are_those_of_the_dense_network(
    batch_norm,
):
    x = images()
    variables = trained(Net(), x)
    variables = jax.tree.map(jnp.asarray, variables)
    small = compress(Net().apply, variables, x, CUT, batch_norm=batch_norm)
    kept = {
        "capture_intermediates": lambda module, _: (
            module.name in ("BatchNorm_0", "circular", "BatchNorm_1")
        )
    }
    dense = Net().apply(variables, x, **kept)[1]["intermediates"]
    low = lowrank(Net().apply)(small, x, **kept)[1]["intermediates"]
    for name in (
        ("BatchNorm_0", "circular", "BatchNorm_1") if batch_norm == "mean" else ("circular",)
    ):
        means = [tree[name]["__call__"][0].mean((0, 1, 2)) for tree in (dense, low)]
        np.testing.assert_allclose(
            means[1], means[0], atol=1e-4
        )  # means of a few thousand float32 values


def test_without_any_change_keep_leaves_the_statistics():
    x = images()
    variables = trained(Net(), x)
    small = compress(Net().apply, variables, x, CUT, batch_norm="keep")
    chex.assert_trees_all_equal(small["batch_stats"], variables["batch_stats"])


def test_layers_in_lifted_transformations_get_the_plain_factors():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Conv(4, (3, 3), name="inner")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block, length=2, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            return nn.Conv(4, (3, 3), name="last")(scan(name="loop")(x, None)[0])

    x = images()
    variables = Model().init(jax.random.key(0), x)
    small = compress(Model().apply, variables, x, {"loop/inner": 4, "last": 4})
    plain = decompose(variables["params"], {"loop/inner": 4})
    chex.assert_trees_all_close(small["params"]["loop"], plain["loop"], atol=1e-6)
    assert gap(Model(), variables, small, x) < 1


def test_a_layer_used_twice_is_fitted_once():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Conv(4, (3, 3), name="layer")
            return layer(nn.relu(layer(x)))

    x = images()
    variables = Model().init(jax.random.key(0), x)
    small = compress(Model().apply, variables, x, {"layer": max_rank((3, 3, 4, 4))})
    assert gap(Model(), variables, small, images(seed=7)) < 1e-3


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_layers_error_on_the_calibration_images_is_never_above_that_of_the_plain_svd(rank):
    model, x = nn.Conv(8, (3, 3), padding="VALID", use_bias=False), images()
    variables = model.init(jax.random.key(0), x)
    dense, run = model.apply(variables, x), lowrank(model.apply)

    def variance(small):  # what the fit minimises: the means are the part of the biases
        return float((run(small, x) - dense).var((0, 1, 2)).sum())

    plain = {"params": decompose(variables["params"], {"": rank})}
    assert variance(compress(model.apply, variables, x, {"": rank})) <= variance(plain) * (
        1 + 1e-5
    )  # float32


def test_inputs_by_name_and_transposed_layers_are_known():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(True, name="norm")(x=nn.Conv(8, (3, 3), name="named")(inputs=x))
            return nn.ConvTranspose(4, (3, 3), name="upper")(inputs=x)

    x = images()
    variables = trained(Model(), x)
    small = compress(Model().apply, variables, x, {"named": 3, "upper": 3})
    assert not np.allclose(
        small["params"]["named"]["horizontal"]["bias"], variables["params"]["named"]["bias"]
    )
    chex.assert_trees_all_equal(
        small["params"]["upper"], decompose(variables["params"], {"upper": 3})["upper"]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_have_the_type_of_the_kernel(dtype):
    layer, x = nn.Sequential([nn.Conv(8, (3, 3), param_dtype=jnp.dtype(dtype))]), images()
    variables = layer.init(jax.random.key(0), x)
    small = compress(layer.apply, variables, x, {"layers_0": 3})
    chex.assert_type(jax.tree.leaves(small["params"]), jnp.dtype(dtype))


def test_where_samples_are_fewer_than_dimensions_the_shrinkage_keeps_the_dense_kernel():
    layer, x = nn.Conv(8, (3, 3)), images(1, size=4)  # 16 patches of 36 entries
    variables = layer.init(jax.random.key(0), x)
    small = compress(layer.apply, variables, x, {"": max_rank((3, 3, 4, 8))})
    # The kernel itself solves the shrunk equations; their moments, in float32, are off by 6e-8 of
    # the trace, of which the ridge is 1e-4 / 36: errors of about 2 % in entries of up to 0.5.
    np.testing.assert_allclose(
        reconstruct(small)["params"]["kernel"], variables["params"]["kernel"], atol=1e-2
    )


def test_fewer_samples_than_dimensions_still_give_finite_factors():
    x = images(1, size=4)
    variables = trained(Net(), x)
    for ranks in (CUT, plan(Net().apply, variables, x, macs=0.6).ranks):
        small = compress(Net().apply, variables, x, ranks)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(small))


def test_images_without_a_batch_are_refused():
    layer, x = nn.Conv(8, (3, 3)), images()
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(
        ValueError,
        match=r"its inputs of shape \(20, 10, 4\) do not have the images along the first",
    ):
        compress(layer.apply, variables, x[0], {"": 3})


@pytest.mark.parametrize(
    "change, text",
    [
        ({"ranks": {"strided": 99}}, "strided: rank 99 is not allowed"),
        ({"ranks": {"stride": 2}}, "did you mean 'strided'"),
        ({"batch_norm": "all"}, "batch_norm='all' is not allowed"),
        ({"ranks": {}}, "table of ranks is empty"),
        ({"sweeps": 0.5}, "sweeps=0.5 is not allowed"),
        (
            {"images": jnp.full((2, 10, 10, 4), jnp.nan)},
            "strided: The activations hold NaN or infinite",
        ),
        ({"images": jnp.zeros((0, 10, 10, 4))}, "empty"),
        (
            {"images": jnp.zeros((2, 10, 10, 3))},
            r"does not run on images of shape \(2, 10, 10, 3\)",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(change, text):
    variables = trained(Net(), images())
    given = {"images": images(), "ranks": {"strided": 2}} | change
    with pytest.raises(ValueError, match=text):
        compress(Net().apply, variables, given.pop("images"), given.pop("ranks"), **given)
