"""Compression of NNX models with data: what Linen's gives, exact at full rank, the model given
untouched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lowrank_jax
from lowrank_jax import Separable, max_rank
from lowrank_jax.calibration.collecting import reestimate as reestimate_linen
from lowrank_jax.nnx import SeparableConv, compress, decompose, plan, reconstruct, reestimate
from lowrank_jax.nnx.calibrate import calibrate, output_scales


def images(count=16, seed=0, size=8):
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    x = np.random.default_rng(seed).standard_normal((count, size, size, 4))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 2
    return jnp.asarray(x, jnp.float32)


class LinenNet(nn.Module):
    """Strided, grouped and circular convolutions, with and without normalisation and bias."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(
            nn.BatchNorm(not train, name="norm0")(
                nn.Conv(8, (3, 3), 2, use_bias=False, name="strided")(x)
            )
        )
        x = nn.relu(nn.Conv(8, (3, 5), padding="CIRCULAR", name="circular")(x))
        x = nn.relu(
            nn.BatchNorm(not train, name="norm1")(
                nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
            )
        )
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Net(nnx.Module):
    """The same in NNX; its normalisations are in training mode until someone calls ``eval``."""

    def __init__(self, rngs):
        self.strided = nnx.Conv(4, 8, (3, 3), 2, use_bias=False, rngs=rngs)
        self.circular = nnx.Conv(8, 8, (3, 5), padding="CIRCULAR", rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.norm0, self.norm1 = nnx.BatchNorm(8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.strided(x)))
        x = nnx.relu(self.circular(x))
        x = nnx.relu(self.norm1(self.grouped(inputs=x)))
        return self.head(self.dropout(x.mean((1, 2))))


@functools.cache
def pair():
    """A trained network in Linen and in NNX, the latter in evaluation mode."""
    variables = LinenNet().init(jax.random.key(0), images(1))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * rng.standard_normal(leaf.shape) ** 2), variables
    )
    model = Net(nnx.Rngs(0))
    for collection in variables.values():
        for layer, leaves in collection.items():
            for name, leaf in leaves.items():
                getattr(getattr(model, layer), name).set_value(leaf)
    model.eval()
    return variables, model


def net():
    return pair()[1]


def arrays(model):
    leaves = jax.tree.leaves(nnx.state(model))
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]


def tree(model):
    return nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def merged(variables):
    """Linen's collections as one tree."""
    params, stats = variables["params"], variables["batch_stats"]
    return {name: params.get(name, {}) | stats.get(name, {}) for name in params}


def gap(model, small, x):
    model, small = nnx.clone(model), nnx.clone(small)
    model.eval()
    small.eval()
    dense = model(x)
    return float(jnp.linalg.norm(small(x) - dense) / jnp.linalg.norm(dense))


CUT = {"strided": 3, "circular": 5, "grouped": Separable(2, 2)}
# The same functions on the same arrays: only the order of float32 sums may differ, by some 1e-7 of
# the terms, which least squares amplify by up to 1e3.
SAME = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def cut(batch_norm="mean"):
    return compress(net(), images(), CUT, batch_norm=batch_norm)


def test_linen_and_nnx_give_the_same_plan():
    (variables, model), x = pair(), images()
    for given in ({"macs": 0.5}, {"parameters": 0.4, "multiple": 2}):
        one = lowrank_jax.plan(LinenNet().apply, variables, x, **given)
        two = plan(model, x, **given)
        assert one.ranks == two.ranks and one.total("macs") == two.total("macs")


@pytest.mark.parametrize("batch_norm", ["mean", "full", "keep"])
def test_linen_and_nnx_give_the_same_compressed_network(batch_norm):
    (variables, _), x = pair(), images()
    linen = lowrank_jax.compress(LinenNet().apply, variables, x, CUT, batch_norm=batch_norm)
    small = cut(batch_norm)
    chex.assert_trees_all_close(tree(small), merged(linen), **SAME)
    other = images(seed=7)
    np.testing.assert_allclose(
        small(other), lowrank_jax.lowrank(LinenNet().apply)(linen, other), **SAME
    )


def test_linen_and_nnx_give_the_same_moments_and_scales():
    (variables, model), x = pair(), images()
    linen = lowrank_jax.calibrate.calibrate(LinenNet().apply, variables, [x])
    found = calibrate(model, [x])
    assert set(found) == set(linen) == set(CUT)
    for path, expected in linen.items():
        np.testing.assert_allclose(found[path].covariance, expected.covariance, **SAME)
    scales = lowrank_jax.calibrate.output_scales(LinenNet().apply, variables, x)
    chex.assert_trees_all_close(output_scales(model, x), scales)
    assert set(scales) == {"strided", "grouped"}


def test_linen_and_nnx_give_the_same_reestimated_statistics():
    (variables, model), x = pair(), images()
    linen = reestimate_linen(LinenNet().apply, variables, [x[:8], x[8:]], train=True)
    chex.assert_trees_all_close(tree(reestimate(model, [x[:8], x[8:]])), merged(linen), **SAME)


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
def test_at_full_rank_the_network_computes_what_it_did(first):
    shapes = {
        "strided": ((3, 3, 4, 8), 1),
        "circular": ((3, 5, 8, 8), 1),
        "grouped": ((3, 3, 4, 8), 2),
    }
    ranks = {
        path: Separable(max_rank(*given, first=first), given[1], first=first)
        for path, given in shapes.items()
    }
    small = compress(net(), images(), ranks)
    assert gap(net(), small, images(seed=7)) < 1e-3  # the shrinkage and float32, over three layers


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_layer_s_error_on_the_calibration_images_is_never_above_that_of_the_plain_svd(
    rank, first
):
    layer, x = (
        nnx.Sequential(nnx.Conv(4, 8, (3, 3), padding="VALID", use_bias=False, rngs=nnx.Rngs(3))),
        images(),
    )
    ranks = {"layers/0": Separable(rank, first=first)}

    def variance(small):  # what the fit minimises: means are the biases' part
        return float((small(x) - layer(x)).var((0, 1, 2)).sum())

    assert variance(compress(layer, x, ranks)) <= variance(decompose(layer, ranks)) * (1 + 1e-5)


def test_it_is_closer_than_the_plain_svd_on_other_images():
    x = images(seed=7)
    assert gap(net(), cut(), x) < 0.7 * gap(net(), decompose(net(), CUT), x)


def test_keep_leaves_the_statistics_and_what_is_not_named_is_the_same_array():
    small = cut("keep")
    for norm in ("norm0", "norm1"):
        chex.assert_trees_all_equal(tree(small)[norm], tree(net())[norm])
    assert small.head.kernel.get_value() is net().head.kernel.get_value()
    chex.assert_trees_all_equal_shapes_and_dtypes(tree(small), tree(decompose(net(), CUT)))


def test_the_model_given_is_untouched_and_its_mode_is_kept():
    model = Net(nnx.Rngs(0))
    objects, before = (
        [id(node) for _, node in nnx.iter_graph(model)],
        [np.array(x) for x in arrays(model)],
    )
    results = [compress(model, images(), {"circular": 5}), reestimate(model, [images()])]
    plan(model, images(), macs=0.9)
    assert [id(node) for _, node in nnx.iter_graph(model)] == objects
    chex.assert_trees_all_equal(arrays(model), before)
    for other in (model, *results):
        assert other.norm0.use_running_average is False and other.dropout.deterministic is False
    results[0].circular.horizontal.bias[...] += 1
    results[1].norm0.mean[...] += 1
    chex.assert_trees_all_equal(arrays(model), before)


def test_a_model_in_training_mode_is_compressed_as_in_evaluation():
    model = nnx.clone(net())
    model.train()
    chex.assert_trees_all_equal(tree(compress(model, images(), CUT)), tree(cut()))


class Switched(nnx.Module):
    """Tells its normalisation by the call what to do."""

    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(4, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x, train):
        return self.norm(x=self.conv(x), use_running_average=not train)


@pytest.mark.parametrize("train", [True, False])
def test_the_mode_in_the_call_does_not_matter(train):
    model, x = Switched(nnx.Rngs(0)), images()
    small = compress(model, x, plan(model, x, train, macs=0.5).ranks, train=train)
    assert type(small.conv) is SeparableConv
    found = reestimate(model, [x], train=train)
    np.testing.assert_allclose(found.norm.mean[...], model.conv(x).mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(
        small(x, False).mean((0, 1, 2)), model(x, False).mean((0, 1, 2)), atol=1e-5
    )


class Curious(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        assert not hasattr(self.conv, "weight") and isinstance(self.conv.kernel, nnx.Variable)
        return self.conv(x.astype(self.conv.kernel.dtype)) * self.conv.in_features


def test_a_model_may_read_the_attributes_of_its_layers():
    assert set(calibrate(Curious(), [images()])) == {"conv"}


def test_reestimated_statistics_of_a_compressed_model_are_those_of_its_own_layers():
    small = reestimate(cut(), [images()])
    np.testing.assert_allclose(
        small.norm0.mean[...], small.strided(images()).mean((0, 1, 2)), atol=1e-5
    )


class Tied(nnx.Module):
    """One layer used twice, another layer with the same kernel, and a bias in two layers."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, 4, 4, (3, 3), rngs=rngs)
        self.twice, self.same, self.other = conv(), conv(strides=2), conv()
        self.same.kernel, self.same.bias = self.twice.kernel, nnx.Param(jnp.ones(4))
        self.other.bias = nnx.Param(jnp.ones(4))
        self.biased = conv()
        self.biased.bias = self.other.bias
        self.upper = nnx.ConvTranspose(4, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = self.same(nnx.relu(self.twice(nnx.relu(self.twice(x)))))
        return self.upper(self.biased(nnx.relu(self.other(x))))


def test_shared_layers_kernels_and_biases_stay_shared_and_full_ranks_are_exact():
    model, x = Tied(nnx.Rngs(0)), images()
    full = max_rank((3, 3, 4, 4))
    small = compress(model, x, {"same": full, "other": full, "upper": full})
    assert small.same.vertical.kernel is small.twice.vertical.kernel
    assert small.other.horizontal.bias is small.biased.bias
    np.testing.assert_allclose(small.biased.bias[...], 1)
    assert gap(model, small, images(seed=7)) < 1e-3  # the shrinkage and float32


def test_below_full_rank_only_a_bias_of_one_layer_is_moved():
    model, x = Tied(nnx.Rngs(0)), images()
    small = compress(model, x, {"same": 2, "other": 2})
    np.testing.assert_array_equal(small.other.horizontal.bias[...], 1)
    assert not np.allclose(small.same.horizontal.bias[...], 1)
    np.testing.assert_allclose(
        small.twice(x).mean((0, 1, 2)), model.twice(x).mean((0, 1, 2)), atol=1e-4
    )


class Crossed(nnx.Module):
    """A convolution and a transposed one with the same kernel."""

    def __init__(self, upper_first):
        self.conv, self.upper = (
            kind(4, 4, (3, 3), rngs=nnx.Rngs(0)) for kind in (nnx.Conv, nnx.ConvTranspose)
        )
        self.upper.kernel, self.upper_first = self.conv.kernel, upper_first

    def __call__(self, x):
        return self.conv(self.upper(x)) if self.upper_first else self.upper(self.conv(x))


def test_a_kernel_keeps_the_factors_of_its_first_use():
    plain, x = tree(decompose(Crossed(True), {"conv": 3}))["conv"]["vertical"], images()
    for upper_first in (True, False):
        small = compress(Crossed(upper_first), x, {"conv": 3})
        assert small.conv.vertical.kernel is small.upper.vertical.kernel
        found = tree(small)["conv"]["vertical"]
        assert np.allclose(found["kernel"], plain["kernel"], atol=1e-6) == upper_first


def test_a_transposed_convolution_has_the_factors_of_decompose():
    model = Tied(nnx.Rngs(0))
    small, expected = compress(model, images(), {"upper": 2}), decompose(model, {"upper": 2})
    chex.assert_trees_all_equal(tree(small), tree(expected))


class Stack(nnx.Module):
    def __init__(self, rngs):
        def make(rngs):
            return nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs))

        self.layers = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(2))
        self.last = nnx.Conv(4, 4, (3, 3), rngs=rngs)

    def __call__(self, x):
        def step(x, layer):
            return nnx.relu(layer(x))

        return self.last(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers))


def test_scanned_layers_have_the_plain_factors_and_later_ones_make_up_for_them():
    model, x = Stack(nnx.Rngs(0)), images()
    ranks = {"layers/layers/0": 3, "last": 6}
    assert set(plan(model, x, macs=0.6).ranks) <= set(ranks)
    small, plain = compress(model, x, ranks), decompose(model, ranks)
    chex.assert_trees_all_equal(tree(small)["layers"], tree(plain)["layers"])
    assert gap(model, small, x) < gap(model, plain, x)


def test_a_scanned_normalisation_is_not_reestimated():
    with pytest.raises(
        ValueError, match="layers/layers/1: a batch normalisation within a transformation"
    ):
        reestimate(Stack(nnx.Rngs(0)), [images()])


def test_a_single_layer_is_a_model():
    layer, x = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), images()
    assert gap(layer, compress(layer, x, {"": max_rank((3, 3, 4, 8))}), x) < 1e-3
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(reestimate(norm, [x]).mean[...], x.mean((0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("options", [{"param_dtype": jnp.bfloat16}, {"padding": "REFLECT"},
                                     {"preferred_element_type": "float32", "dtype": "bfloat16"}], ids=str)  # fmt: skip
def test_every_option_of_a_layer_is_kept(options):
    layer, x = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0), **options)), images()
    small = compress(layer, x, {"layers/0": max_rank((3, 3, 4, 8))})
    chex.assert_trees_all_equal_shapes_and_dtypes(
        tree(small), tree(decompose(layer, {"layers/0": 12}))
    )
    assert small(x).dtype == layer(x).dtype
    np.testing.assert_allclose(
        np.float32(small(x)), np.float32(layer(x)), atol=0.1
    )  # about 2^-8 of entries up to 10


def test_a_layer_of_dilated_inputs_has_the_plain_factors():
    layer = nnx.Sequential(nnx.Conv(4, 8, (3, 3), input_dilation=2, padding=1, rngs=nnx.Rngs(0)))
    chex.assert_trees_all_equal(
        tree(compress(layer, images(), {"layers/0": 2})), tree(decompose(layer, {"layers/0": 2}))
    )


def test_where_samples_are_fewer_than_dimensions_the_shrinkage_keeps_the_dense_kernel():
    layer, x = (
        nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)),
        images(1, size=4),
    )  # 16 patches of 36 entries
    small = compress(layer, x, {"": max_rank((3, 3, 4, 8))})
    # The kernel itself solves the shrunk equations; their moments, in float32, are off by 6e-8 of
    # the trace, of which the ridge is 1e-4 / 36: errors of about 2 % in entries of up to 0.5.
    np.testing.assert_allclose(reconstruct(small).kernel[...], layer.kernel[...], atol=1e-2)
    small = compress(net(), x, plan(net(), x, macs=0.6).ranks)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree(small)))


def test_a_normalisation_of_other_axes_than_the_last_is_refused():
    model = nnx.Sequential(
        nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.BatchNorm(8, axis=1, rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match="layers/1: axis=1 is not known"):
        compress(model, images(), {"layers/0": 2})
    compress(model, images(), {"layers/0": 2}, batch_norm="keep")


class Mixed(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.conv(x[0])


REFUSED = [
    ({"ranks": {"strided": 99}}, "strided: rank 99 is not allowed"),
    ({"ranks": {"stride": 2}}, "did you mean 'strided'"),
    ({"ranks": {"head": 2}}, "head: cannot be decomposed"),
    ({"ranks": {}}, "table of ranks is empty"),
    ({"batch_norm": "all"}, "batch_norm='all' is not allowed"),
    ({"sweeps": -1}, "sweeps=-1 is not allowed"),
    ({"images": jnp.full((2, 8, 8, 4), jnp.nan)}, "strided: The activations hold NaN or infinite"),
    ({"images": jnp.zeros((0, 8, 8, 4))}, "No calibration data"),
    ({"images": jnp.zeros((2, 8, 8, 3))}, r"does not run on images of shape \(2, 8, 8, 3\)"),
    (
        {"images": images()[0], "model": Net(nnx.Rngs(0))},
        "do not have the images|does not run on images",
    ),
    (
        {"model": Mixed(), "ranks": {"conv": 2}},
        r"conv: its inputs of shape \(8, 8, 4\) do not have the images",
    ),
    (
        {"model": [nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))]},
        "A list is not allowed; give an nnx.Module",
    ),
    ({"model": nnx.Dict()}, "A Dict is not allowed; give an nnx.Module"),
]


@pytest.mark.parametrize("change, text", REFUSED)
def test_what_cannot_be_used_is_refused(change, text):
    given = {"model": net(), "images": images(4), "ranks": {"strided": 2}} | change
    with pytest.raises(ValueError, match=text):
        compress(given.pop("model"), given.pop("images"), given.pop("ranks"), **given)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"macs": None}, "exactly one budget"),
        ({"parameters": 0.5}, "exactly one budget"),
        ({"images": jnp.zeros((0, 8, 8, 4))}, "No calibration data"),
        (
            {"images": jnp.full((2, 8, 8, 4), jnp.inf)},
            "strided: The activations hold NaN or infinite",
        ),
        ({"images": jnp.zeros((2, 8, 8, 3))}, "does not run on images of shape"),
    ],
)
def test_a_plan_without_budget_or_data_is_refused(change, text):
    given = {"images": images(4), "macs": 0.5} | change
    with pytest.raises(ValueError, match=text):
        plan(net(), given.pop("images"), **given)


def test_without_data_or_normalisation_nothing_is_reestimated():
    for use in (calibrate, reestimate):
        with pytest.raises(ValueError, match="No calibration data"):
            use(net(), [])
    with pytest.raises(ValueError, match="norm0: the activations hold NaN"):
        reestimate(net(), [jnp.full((2, 8, 8, 4), jnp.nan)])
    with pytest.raises(ValueError, match=r"Conv ran no nnx\.BatchNorm"):
        reestimate(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), [images(4)])
