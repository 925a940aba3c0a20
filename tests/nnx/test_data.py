"""The verbs that need data, for models of NNX: what Linen's give, the model given untouched."""

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
from lowrank_jax.calibration.batch_norm import reestimate as reestimate_linen
from lowrank_jax.nnx import (
    SeparableConv,
    calibrate,
    compress,
    decompose,
    functional,
    plan,
    reconstruct,
    reestimate,
)


def images(count=16, seed=0, size=8):
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    x = np.random.default_rng(seed).standard_normal((count, size, size, 4))
    for axis in (1, 2):
        x = (x + np.roll(x, 1, axis) + np.roll(x, 2, axis)) / 2
    return jnp.asarray(x, jnp.float32)


def fill(key, shape, dtype=jnp.float32, **options):
    """An initialiser for which nothing has to be compiled."""
    deviation = np.sqrt(1 / np.prod(shape[:-1], initial=1))
    return jnp.asarray(np.random.default_rng(len(shape)).normal(0, deviation, shape), dtype)


def conv_of(*sizes, **options):
    return nnx.Conv(*sizes, kernel_init=fill, rngs=nnx.Rngs(0), **options)


class LinenNet(nn.Module):
    """A strided and a grouped, circular convolution, with and without bias."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, not train)
        x = nn.Conv(8, (3, 3), 2, use_bias=False, name="strided")(x)
        x = nn.relu(norm(name="norm0")(x))
        x = nn.Conv(8, (3, 3), padding="CIRCULAR", feature_group_count=2, name="grouped")(x)
        x = nn.relu(norm(name="norm1")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Net(nnx.Module):
    """The same in NNX; its normalisations are in training mode until someone calls ``eval``."""

    def __init__(self):
        self.strided = conv_of(4, 8, (3, 3), strides=2, use_bias=False)
        self.grouped = conv_of(8, 8, (3, 3), padding="CIRCULAR", feature_group_count=2)
        self.norm0, self.norm1 = (nnx.BatchNorm(8, rngs=nnx.Rngs(0)) for _ in range(2))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.strided(x)))
        x = nnx.relu(self.norm1(self.grouped(inputs=x)))
        return self.head(self.dropout(x.mean((1, 2))))


@functools.cache
def pair():
    """A network in Linen and the same in NNX, the latter in evaluation mode."""
    shapes = jax.eval_shape(LinenNet().init, jax.random.key(0), images(1))
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape) ** 2, x.dtype)  # noqa: E731
    variables = jax.tree.map(draw, shapes)
    names = [name for name in variables["params"] if "norm" not in name]
    for name in names:
        shape = variables["params"][name]["kernel"].shape
        deviation = np.sqrt(2 / np.prod(shape[:-1]))
        kernel = jnp.asarray(rng.normal(0, deviation, shape), jnp.float32)
        variables["params"][name]["kernel"] = kernel
    model = Net()
    model.eval()
    nnx.update(model, joined(variables))
    return variables, model


def net():
    return pair()[1]


def joined(variables):
    """Linen's collections as one tree."""
    params, stats = variables["params"], variables["batch_stats"]
    return {name: params.get(name, {}) | stats.get(name, {}) for name in params}


def tree(model):
    return nnx.to_pure_dict(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def arrays(model):
    leaves = jax.tree.leaves(nnx.state(model))
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [jax.random.key_data(x) if key else x for x, key in zip(leaves, keys, strict=True)]


def gap(model, small, x):
    apply, variables = functional(model)
    dense = apply(variables, x)
    found = lowrank_jax.lowrank(apply)(functional(small)[1], x)
    return float(jnp.linalg.norm(found - dense) / jnp.linalg.norm(dense))


CUT = {"strided": 3, "grouped": Separable(2, 2)}
# The same functions on the same arrays: only the order of float32 sums may differ, by some 1e-7 of
# the terms, which least squares amplify by up to 1e3.
SAME = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def calibrated():
    return calibrate(net(), images())


@functools.cache
def cut():
    return compress(calibrated(), CUT)


@pytest.mark.slow
def test_linen_and_nnx_give_the_same_plan_and_the_same_network():
    (variables, _), x = pair(), images()
    linen = lowrank_jax.calibrate(LinenNet().apply, variables, x)
    one, two = lowrank_jax.plan(linen, macs=0.5), plan(calibrated(), macs=0.5)
    assert one.ranks == two.ranks and one.total("macs") == two.total("macs")
    small = lowrank_jax.compress(linen, CUT)
    chex.assert_trees_all_close(tree(cut()), joined(small), **SAME)
    run, other = lowrank_jax.lowrank(LinenNet().apply), images(seed=7)
    np.testing.assert_allclose(cut()(other), run(small, other), **SAME)


def test_the_short_forms_give_what_the_calibration_gives():
    model, x = nnx.Sequential(conv_of(4, 8, (3, 3)), nnx.relu), images()
    found = calibrate(model, x)
    ranks = plan(found, macs=0.5)
    assert plan(model, x, macs=0.5).ranks == ranks.ranks
    small, fits = compress(model, x, ranks, return_fits=True)
    chex.assert_trees_all_close(tree(small), tree(compress(found, ranks)), **SAME)
    assert set(fits) == {"layers/0"}


def test_linen_and_nnx_give_the_same_reestimated_statistics():
    (variables, model), x = pair(), images()
    batches = [x[:8], x[8:]]
    linen = reestimate_linen(LinenNet().apply, variables, batches, train=True)
    chex.assert_trees_all_close(tree(reestimate(model, batches)), joined(linen), **SAME)


def test_at_full_rank_the_network_computes_what_it_did():
    shapes = {path: getattr(net(), path).kernel.shape for path in CUT}
    groups = {"strided": 1, "grouped": 2}
    ranks = {p: Separable(max_rank(shapes[p], groups[p]), groups[p]) for p in CUT}
    small = compress(calibrated(), ranks)
    assert gap(net(), small, images(seed=7)) < 1e-3  # the shrinkage and float32, over two layers


def test_it_is_nearer_to_the_dense_network_than_the_plain_factors():
    x = images(seed=7)
    assert gap(net(), cut(), x) < 0.7 * gap(net(), decompose(net(), CUT), x)


def test_what_is_not_named_is_the_same_array_and_all_shapes_are_those_of_decompose():
    assert cut().head.kernel.get_value() is net().head.kernel.get_value()
    chex.assert_trees_all_equal_shapes_and_dtypes(tree(cut()), tree(decompose(net(), CUT)))
    assert isinstance(cut().grouped, SeparableConv)


def test_the_model_given_is_untouched_and_its_mode_is_kept():
    model = nnx.clone(net())
    model.train()
    objects = [id(node) for _, node in nnx.iter_graph(model)]
    before = [np.array(x) for x in arrays(model)]
    results = [compress(model, images(), CUT), reestimate(model, images())]
    assert [id(node) for _, node in nnx.iter_graph(model)] == objects
    chex.assert_trees_all_equal(arrays(model), before)
    for other in (model, *results):
        assert other.norm0.use_running_average is False and other.dropout.deterministic is False
    chex.assert_trees_all_close(tree(results[0]), tree(cut()), **SAME)  # as in evaluation
    results[0].grouped.bias[...] += 1
    results[1].norm0.mean[...] += 1
    chex.assert_trees_all_equal(arrays(model), before)


class Switched(nnx.Module):
    """Tells its normalisation by the call what to do."""

    def __init__(self):
        self.conv, self.norm = conv_of(4, 8, (3, 3)), nnx.BatchNorm(8, rngs=nnx.Rngs(0))

    def __call__(self, x, train):
        return self.norm(x=self.conv(x), use_running_average=not train)


@pytest.mark.slow
def test_arguments_of_the_model_are_passed_to_it():
    model, x = Switched(), images()
    small = compress(model, x, plan(model, x, macs=0.5, train=False), train=False)
    plain = decompose(model, plan(model, x, macs=0.5, train=False))
    far, near = (jnp.abs((m(x, False) - model(x, False)).mean((0, 1, 2))) for m in (plain, small))
    assert near.max() < 0.2 * far.max()
    found = reestimate(small, x, train=True)
    expected = small.conv(x).mean((0, 1, 2))
    np.testing.assert_allclose(found.norm.mean[...], expected, atol=1e-5)
    with pytest.raises(ValueError, match="train=True is not allowed"):
        plan(model, x, macs=0.5, train=True)
    with pytest.raises(ValueError, match="The model updates no statistics"):
        reestimate(model, x, train=False)


class Curious(nnx.Module):
    def __init__(self):
        self.conv = conv_of(4, 8, (3, 3))

    def __call__(self, x):
        assert not hasattr(self.conv, "weight") and isinstance(self.conv.kernel, nnx.Variable)
        return self.conv(x.astype(self.conv.kernel.dtype)) * self.conv.in_features


def test_a_model_may_read_the_attributes_of_its_layers():
    assert set(calibrate(Curious(), images(4)).moments) == {"conv"}


class Within(nnx.Module):
    """A layer under ``nnx.jit``, and a stack in ``nnx.scan``."""

    def __init__(self):
        def make(rngs):
            return nnx.Sequential(nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs))

        self.jitted = conv_of(4, 4, (3, 3))
        self.layers = nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(2))

    def __call__(self, x):
        def step(x, layer):
            return nnx.relu(layer(x))

        x = nnx.relu(nnx.jit(lambda layer, x: layer(x))(self.jitted, x))
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


WITHIN = {"jitted": 3, "layers/layers/0": 3}


@functools.cache
def within():
    model = Within()
    model.eval()
    return model


@pytest.mark.slow
def test_layers_in_transformations_are_fitted_like_others():
    small, fits = compress(within(), images(), WITHIN, return_fits=True)
    plain = decompose(within(), WITHIN)
    assert {path: len(own) for path, own in fits.items()} == {p: 1 + ("/" in p) for p in WITHIN}
    for path in WITHIN:
        one, two = (kernel_at(model, path) for model in (small, plain))
        assert not np.allclose(one, two, atol=1e-3)
    assert gap(within(), small, images(seed=7)) < 0.9 * gap(within(), plain, images(seed=7))


def kernel_at(model, path):
    node = model
    for name in path.split("/"):
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    return node.kernel[...]


def test_normalisations_in_a_scan_are_reestimated():
    model, x = within(), images()
    found = reestimate(model, x).layers.layers[1].mean[...]
    first = nnx.relu(model.jitted(x))
    conv = conv_of(4, 4, (3, 3))
    kernel, bias = (v[...][0] for v in (model.layers.layers[0].kernel, model.layers.layers[0].bias))
    conv.kernel[...], conv.bias[...] = kernel, bias
    np.testing.assert_allclose(found[0], conv(first).mean((0, 1, 2)), atol=1e-5)
    assert found.shape == (2, 4) and not np.allclose(found[1], 0)


class Ensemble(nnx.Module):
    """Heads under vmap, which all read the same images."""

    def __init__(self):
        make = lambda rngs: nnx.Conv(4, 4, (3, 3), rngs=rngs)  # noqa: E731
        self.heads = nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(2))

    def __call__(self, x):
        return nnx.vmap(lambda head, x: head(x), in_axes=(0, None), out_axes=-1)(self.heads, x)


@pytest.mark.slow
def test_an_ensemble_under_vmap_is_planned_and_fitted():
    model, found = Ensemble(), calibrate(Ensemble(), images())
    assert set(plan(found, macs=0.5).ranks) == {"heads"}
    small, fits = compress(found, {"heads": 3}, return_fits=True)
    assert set(fits["heads"]) == {(0,), (1,)}
    plain, x = decompose(model, {"heads": 3}), images(seed=7)
    assert gap(model, small, x) < gap(model, plain, x)


class Tied(nnx.Module):
    """Two layers with one kernel, and a bias in two layers."""

    def __init__(self):
        conv = functools.partial(conv_of, 4, 4, (3, 3))
        self.twice, self.same, self.other, self.biased = conv(), conv(strides=2), conv(), conv()
        self.same.kernel = self.twice.kernel
        self.other.bias = nnx.Param(jnp.ones(4))
        self.biased.bias = self.other.bias

    def __call__(self, x):
        x = self.same(nnx.relu(self.twice(nnx.relu(self.twice(x)))))
        return self.biased(nnx.relu(self.other(x)))


def test_shared_kernels_and_biases_stay_shared_and_are_fitted_once():
    small, fits = compress(Tied(), images(), {"same": 3, "other": 2}, return_fits=True)
    assert small.same.kernel is small.twice.kernel and small.other.bias is small.biased.bias
    assert {path: len(own) for path, own in fits.items()} == {"same": 1, "other": 1}
    plain = decompose(Tied(), {"same": 3}).same.kernel[...]
    assert not np.allclose(small.same.kernel[...], plain, atol=1e-3)
    np.testing.assert_array_equal(small.biased.bias[...], 1)
    dense = reconstruct(small)
    assert dense.same.kernel is dense.twice.kernel


def test_every_option_of_a_layer_is_kept():
    options = {"padding": "REFLECT", "preferred_element_type": "float32", "dtype": "bfloat16"}
    layer, x = nnx.Sequential(conv_of(4, 8, (3, 3), **options)), images()
    full = {"layers/0": max_rank((3, 3, 4, 8))}
    small = compress(layer, x, full)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree(small), tree(decompose(layer, full)))
    found, expected = small(x), layer(x)
    assert found.dtype == expected.dtype
    limit = 0.03 * float(jnp.abs(expected).max())  # bfloat16 rounds to 2^-8 of entries
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=limit)


def test_a_single_layer_is_a_model():
    layer, x = conv_of(4, 8, (3, 3)), images()
    assert gap(layer, compress(layer, x, {"kernel": max_rank((3, 3, 4, 8))}), x) < 1e-3
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(reestimate(norm, x).mean[...], x.mean((0, 1, 2)), atol=1e-5)


def test_statistics_of_a_compressed_model_are_those_of_its_own_layers():
    small, x = reestimate(cut(), images()), images()
    expected = small.strided(x).mean((0, 1, 2))
    np.testing.assert_allclose(small.norm0.mean[...], expected, atol=1e-5)
    assert isinstance(small.strided, SeparableConv)


def test_a_calibration_of_a_function_is_no_calibration_of_a_model():
    found = lowrank_jax.calibrate(lambda scale, x: scale * x, jnp.ones(4), images(2))
    with pytest.raises(ValueError, match="is of the function .*, not of a model of NNX"):  # noqa: RUF043
        compress(found, CUT)


REFUSED = [
    ({"ranks": {"strided": 99}}, "strided: rank 99 is not allowed"),
    ({"ranks": {"stride": 2}}, "did you mean 'strided'"),
    ({"ranks": {"norm0/scale": 2}}, "norm0/scale: not the kernel of a layer"),
    ({"ranks": {}}, "table of ranks is empty"),
    ({"sweeps": -1}, "sweeps=-1 is not allowed"),
    ({"images": jnp.full((2, 8, 8, 4), jnp.nan)}, "strided: the activations hold NaN or infinite"),
    ({"images": jnp.zeros((0, 8, 8, 4))}, "No calibration data"),
    ({"images": jnp.zeros((2, 8, 8, 3))}, r"does not run on inputs \(1, 8, 8, 3\)"),
    ({"model": [conv_of(4, 8, (3, 3))]}, r"A list is not allowed; give an nnx\.Module"),
    ({"model": nnx.Dict()}, r"A Dict is not allowed; give an nnx\.Module"),
    ({"model": decompose(conv_of(4, 8, (3, 3)), {"kernel": 3})}, "is decomposed already"),
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
        ({"images": jnp.zeros((2, 8, 8, 3))}, "does not run on inputs"),
    ],
)
def test_a_plan_without_budget_or_data_is_refused(change, text):
    given = {"images": images(4), "macs": 0.5} | change
    with pytest.raises(ValueError, match=text):
        plan(net(), given.pop("images"), **given)


def test_without_data_or_normalisation_nothing_is_reestimated():
    for verb in (calibrate, reestimate):
        with pytest.raises(ValueError, match="No calibration data"):
            verb(net(), [])
    with pytest.raises(ValueError, match="norm0.*: the activations hold NaN"):  # noqa: RUF043
        reestimate(net(), jnp.full((2, 8, 8, 4), jnp.nan))
    with pytest.raises(ValueError, match=r"The Conv has no nnx\.BatchStat"):
        reestimate(conv_of(4, 8, (3, 3)), images(4))
