"""Layers of NNX whose kernels are factors: the function and the state of the dense layer."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import lowrank_jax
from lowrank_jax import Matrix, Separable, max_rank
from lowrank_jax.factorization.forms import SCHEMES
from lowrank_jax.modules.nnx import variables_of
from lowrank_jax.nnx import Factors, SeparableConv, decompose, reconstruct
from lowrank_jax.tree.paths import named_leaves

RNGS = nnx.Rngs(0)


def normal(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def fill(key, shape, dtype=jnp.float32, **options):
    """An initialiser for which nothing has to be compiled."""
    deviation = np.sqrt(1 / np.prod(shape[:-1], initial=1))
    return jnp.asarray(np.random.default_rng(len(shape)).normal(0, deviation, shape), dtype)


def make_conv(kind=nnx.Conv, kernel_size=(3, 3), channels=4, features=8, **options):
    options = {"kernel_init": fill, "bias_init": fill, "rngs": RNGS} | options
    return kind(channels, features, kernel_size, **options)


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def full_rank(layer, first="vertical"):
    groups = getattr(layer, "feature_group_count", 1)
    axes = {3: "WIO", 4: "HWIO", 5: "DHWIO"}[layer.kernel.ndim]
    rank = max_rank(layer.kernel.shape, groups, axes, first)
    return Separable(rank, groups, axes, first)


def one_of(layer, first="vertical"):
    """The layer with factors of full rank."""
    return decompose(nnx.Dict(layer=layer), {"layer": full_rank(layer, first)})["layer"]


def assert_close(found, expected, *types):
    """Equal to rounding of the coarsest type in use."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    eps = max(float(jnp.finfo(kind).eps) for kind in (expected.dtype, "float32", *types) if kind)
    scale = np.abs(np.asarray(expected, np.float64)).max()
    assert scale > 0.1
    # Sums of tens of terms, both factors and the channels between them rounded.
    np.testing.assert_allclose(np.float64(found), np.float64(expected), atol=20 * eps * scale)


class Empty(nnx.Conv):
    """A subclass that changes nothing."""


class Standardised(nnx.Conv):
    """Its kernel has mean 0 and deviation 1."""

    def __call__(self, inputs):
        own = nnx.clone(self)
        kernel = own.kernel[...]
        own.kernel[...] = (kernel - kernel.mean()) / kernel.std()
        return nnx.Conv.__call__(own, inputs)


class Own(nnx.Module):
    """A convolution with `jax.lax` and a leaf of another name."""

    def __init__(self, *sizes, **options):
        conv = nnx.Conv(*sizes, **options)
        self.filters, self.bias = conv.kernel, conv.bias

    @property
    def kernel(self):
        return self.filters

    def __call__(self, inputs):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            inputs, self.filters[...], (2, 1), "SAME", dimension_numbers=numbers
        )
        return y + self.bias[...]


class Halved(nnx.Param):
    """A variable that shows another value than it stores."""

    def get_value(self, **options):
        return super().get_value(**options) / 2

    def __getitem__(self, index):
        return self.get_value()[index]


def halved():
    conv = make_conv()
    conv.kernel = Halved(conv.kernel[...])
    return conv


MASK = np.float32(np.random.default_rng(1).random((3, 3, 4, 8)) < 0.5)
LAYERS = {
    "plain": make_conv(),
    "strides": make_conv(strides=2, padding="VALID"),
    "circular": make_conv(strides=(2, 1), padding="CIRCULAR"),
    "reflect": make_conv(padding="REFLECT", kernel_size=(2, 4)),
    "pads": make_conv(padding=[(1, 2), (0, 3)], strides=[1, 2]),
    "no bias": make_conv(padding=(2, 1), use_bias=False, strides=None),
    "dilation": make_conv(kernel_dilation=(2, 1), padding="SAME_LOWER"),
    "input dilation": make_conv(input_dilation=(1, 2), padding=[(1, 2), (0, 3)]),
    "groups": make_conv(feature_group_count=2, strides=2),
    "depthwise": make_conv(feature_group_count=4, use_bias=False),
    "pointwise": make_conv(kernel_size=(1, 1), precision="highest"),
    "computes in bfloat16": make_conv(dtype="bfloat16"),
    "kernel in float16": make_conv(param_dtype=jnp.float16),
    "kernel in bfloat16": make_conv(param_dtype=jnp.bfloat16, dtype="float32"),
    "sums in float32": make_conv(dtype="bfloat16", preferred_element_type="float32"),
    "transposed": make_conv(nnx.ConvTranspose, strides=(2, 1), kernel_size=(3, 2)),
    "transposed circular": make_conv(nnx.ConvTranspose, strides=2, padding="CIRCULAR"),
    "transposed kernel": make_conv(nnx.ConvTranspose, features=4, transpose_kernel=True),
    "empty subclass": make_conv(Empty),
    "standardised": make_conv(Standardised),
    "own module": make_conv(Own),
    "masked": make_conv(mask=MASK),
    "own function": make_conv(conv_general_dilated=functools.partial(jax.lax.conv_general_dilated)),
    "own variable": halved(),
    "one axis": make_conv(kernel_size=(4,), padding="CAUSAL", kernel_dilation=2),
    "three axes": make_conv(kernel_size=(3, 2, 2), strides=(1, 2, 1)),
    "weight norm": nnx.WeightNorm(make_conv(), rngs=nnx.Rngs(1)),
    "spectral norm": nnx.SpectralNorm(make_conv(), rngs=nnx.Rngs(1), update_stats=False),
}
HORIZONTAL_FIRST = ("plain", "pads", "groups", "transposed", "own module")


def images_for(layer):
    axes = kernel_of(layer).ndim - 2
    return normal((2, *(9, 7, 5)[:axes], 4))


def kernel_of(layer):
    return getattr(layer, "layer_instance", layer).kernel


def decomposed(layer, first):
    holder = nnx.Dict(layer=layer)
    kernel = kernel_of(layer).get_raw_value()
    path = next(p for p, x in named_leaves(variables_of(holder)).items() if x is kernel)
    inner = getattr(layer, "layer_instance", layer)
    return decompose(holder, {path: full_rank(inner, first)})["layer"]


CASES = [(n, "vertical") for n in LAYERS] + [(n, "horizontal") for n in HORIZONTAL_FIRST]


@functools.cache
def outputs():
    """Of each case: the dense layer's and the decomposed layer's."""
    models = {(n, first): (LAYERS[n], decomposed(LAYERS[n], first)) for n, first in CASES}
    models = {", ".join(case): pair for case, pair in models.items()}
    images = {name: images_for(pair[0]) for name, pair in models.items()}
    run = jax.jit(lambda models: {n: [m(images[n]) for m in pair] for n, pair in models.items()})
    return models, run(models)


@pytest.mark.parametrize("name, first", CASES, ids=str)
def test_at_full_rank_a_layer_of_any_kind_computes_what_the_dense_one_does(name, first):
    models, found = outputs()
    layer, small = models[f"{name}, {first}"]
    assert isinstance(small, SeparableConv) and isinstance(small, type(layer))
    expected, array = found[f"{name}, {first}"]
    assert_close(array, expected, getattr(layer, "dtype", None), kernel_of(layer).dtype)
    dense, limit = reconstruct(small), 0.03 if kernel_of(layer).dtype == "bfloat16" else 3e-3
    assert type(dense) is type(layer)
    chex.assert_trees_all_close(params(dense), params(layer), atol=limit)
    chex.assert_trees_all_equal_shapes_and_dtypes(params(dense), params(layer))


def test_below_full_rank_it_computes_the_convolution_with_the_product():
    layer = make_conv(strides=(1, 2))
    small = decompose(nnx.List([layer]), {"0": 3})[0]
    x = normal((2, 6, 6, 4))
    assert_close(small(x), reconstruct(small)(x))
    assert not np.allclose(small(x), layer(x), atol=0.1)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_dimensions(batch):
    layer = make_conv()
    x = normal((*batch, 6, 5, 4))
    assert_close(one_of(layer)(x), layer(x))


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_state_is_the_tree_that_decompose_gives_for_linen(first, use_bias):
    model = nnx.Dict(conv=make_conv(use_bias=use_bias), head=nnx.Linear(8, 2, rngs=nnx.Rngs(0)))
    ranks = {"conv": Separable(3, first=first), "head": 1}
    small = decompose(model, ranks)
    chex.assert_trees_all_equal(params(small), lowrank_jax.decompose(params(model), ranks))
    linen = lowrank_jax.SeparableConv(8, (3, 3), 3, use_bias=use_bias, first=first)
    variables = jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 5, 5, 4)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params(small.conv), variables["params"])


def test_the_attributes_of_the_layer_and_the_product_can_be_read():
    layer = make_conv(strides=2)
    small = one_of(layer)
    assert (small.in_features, small.strides, small.kernel.shape) == (4, 2, (3, 3, 4, 8))
    assert small.kernel.dtype == jnp.float32 and small.kernel.ndim == 4
    np.testing.assert_allclose(small.kernel[...], layer.kernel[...], atol=1e-5)
    np.testing.assert_allclose(2 * jnp.asarray(small.kernel), 2 * layer.kernel[...], atol=1e-5)


class Penalised(nnx.Module):
    """Reads the kernel of its layer."""

    def __init__(self):
        self.conv = make_conv()

    def __call__(self, x):
        return self.conv(x.astype(self.conv.kernel.dtype)) + jnp.abs(self.conv.kernel[...]).sum()


def test_a_module_that_reads_the_kernel_of_its_layer_gets_the_product():
    model = Penalised()
    small = decompose(model, {"conv": 12})
    x = normal((1, 6, 6, 4))
    assert_close(small(x), model(x))


class Stateful(nnx.Module):
    """A layer with a counter, a random stream, a normalisation and the modules of the call."""

    def __init__(self):
        self.conv = make_conv(features=4).kernel
        self.norm, self.drop = nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x, rngs, scale=1.0, mode="train"):
        assert mode == "train" and scale == 2.0
        self.calls[...] += 1
        y = jax.lax.conv_general_dilated(
            x, self.conv[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return self.drop(self.norm(scale * y), rngs=rngs)


def call(model, x, rngs):
    return model(x, rngs, scale=2.0, mode="train")


def test_changes_of_state_in_the_layer_and_in_its_arguments_stay():
    model, x = Stateful(), normal((1, 6, 6, 4))
    small = decompose(model, {"conv": 12})
    streams = nnx.Rngs(5), nnx.Rngs(5)
    run = nnx.jit(call)
    for _ in range(2):
        pairs = zip((model, small), streams, strict=True)
        expected, found = (run(each, x, rngs) for each, rngs in pairs)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert small.calls[...] == 2 and streams[1].default.count[...] == 2
    np.testing.assert_allclose(small.norm.var[...], model.norm.var[...], rtol=1e-4)
    assert isinstance(small.conv, Factors)


def test_the_state_of_a_wrapping_normalisation_is_updated():
    model = nnx.SpectralNorm(make_conv(), rngs=nnx.Rngs(1))
    small = decompose(nnx.List([model]), {"0/layer_instance": 12})[0]
    x = normal((1, 6, 6, 4))
    one, two = small(x), small(x)
    np.testing.assert_allclose(one, nnx.clone(model)(x), atol=1e-4)
    assert not np.allclose(one, two, atol=1e-5)  # the power iteration goes on


def test_gradients_reach_both_factors_and_a_step_lowers_the_loss():
    small = decompose(nnx.Sequential(make_conv(), nnx.relu), {"layers/0": 3})
    x = normal((2, 6, 6, 4))

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: ((m(x) - 1) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss, gradients

    optimizer = nnx.Optimizer(small, optax.sgd(0.01), wrt=nnx.Param)
    before, gradients = step(small, optimizer)
    chex.assert_trees_all_equal_shapes(gradients, nnx.state(small, nnx.Param))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    assert step(small, optimizer)[0] < before


class Telling(nnx.Conv):
    """A layer that sows its outputs, and holds a variable with more than one value."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.notes = nnx.Variable({"first": jnp.zeros(2), "second": jnp.ones(3)})

    def __call__(self, inputs):
        outputs = super().__call__(inputs)
        self.sow(nnx.Intermediate, "outputs", outputs)
        return outputs + self.notes.get_value()["second"].mean()


def test_what_a_layer_sows_is_captured():
    small, x = decompose(nnx.Sequential(make_conv(Telling)), {"layers/0": 3}), normal((1, 6, 6, 4))
    captured = nnx.capture(lambda model, x: model(x), nnx.Intermediate)
    outputs, notes = captured(small, x)
    np.testing.assert_allclose(notes["layers"][0]["outputs"][0] + 1, outputs, atol=1e-6)


def test_a_decomposed_layer_is_pickled_and_tabulated():
    small, x = one_of(make_conv()), normal((1, 6, 6, 4))
    again = pickle.loads(pickle.dumps(small))
    assert type(again) is type(small)
    np.testing.assert_array_equal(again(x), small(x))
    assert "SeparableConv" in nnx.tabulate(small, x)


class ByHand(nnx.Module):
    def __init__(self, rngs):
        self.vertical = nnx.Conv(4, 3, (3, 1), strides=(2, 1), use_bias=False, rngs=rngs)
        self.horizontal = nnx.Conv(3, 8, (1, 3), strides=(1, 2), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.horizontal(self.vertical(x)))


def test_the_compiled_program_costs_what_one_written_by_hand_does():
    x = normal((2, 8, 8, 4))
    small = decompose(nnx.Sequential(make_conv(strides=2), nnx.relu), {"layers/0": 3})
    run = jax.jit(lambda model, x: model(x))
    models = small, ByHand(nnx.Rngs(0))
    flops = [run.lower(model, x).compile().cost_analysis()["flops"] for model in models]
    assert flops[0] == flops[1]


def test_variables_keep_their_kind_and_their_metadata():
    class Frozen(nnx.Param):
        pass

    model = nnx.Dict(conv=make_conv())
    model.conv.kernel = Frozen(model.conv.kernel[...], note="pretrained")
    small = decompose(model, {"conv": 3}).conv
    dense = reconstruct(small)
    for variable in (small.kernel.vertical, small.kernel.horizontal, dense.kernel):
        assert type(variable) is Frozen and variable.note == "pretrained"


@pytest.mark.parametrize("first, names", [
    ("vertical", ("vertical", "horizontal")),
    ("horizontal", ("horizontal_first", "vertical_second")),
    ("spatial", ("spatial_first", "pointwise_second")),
    ("pointwise", ("pointwise_first", "spatial_second")),
])  # fmt: skip
def test_the_axis_between_the_factors_is_not_sharded(first, names):
    conv = make_conv()
    conv.kernel.set_metadata(out_sharding=(None, None, "in", "out"))
    small = decompose(conv, {"kernel": SCHEMES[first](3, first=first)})
    one, two = (getattr(small.kernel, name) for name in names)
    assert one.out_sharding == (None, None, "in", None)
    assert two.out_sharding == (None, None, None, "out")
    specs = nnx.get_partition_spec(nnx.state(small))["kernel"]
    assert specs[names[0]].get_value() == PartitionSpec(None, None, "in", None)
    assert reconstruct(small).kernel.out_sharding == (None, None, "in", "out")


def test_an_axis_that_a_factor_lacks_is_not_sharded():
    layer = nnx.LinearGeneral(8, (4, 2), rngs=nnx.Rngs(0))
    layer.kernel.set_metadata(out_sharding=("in", "heads", None))
    small = decompose(nnx.Dict(layer=layer), {"layer": Matrix(3, axes="IPO")})
    one, two = (getattr(small.layer.kernel, f"{name}_factor_IPO") for name in ("left", "right"))
    assert one.shape == (8, 1, 3) and one.out_sharding == ("in", None, None)
    assert two.shape == (3, 4, 2) and two.out_sharding == (None, "heads", None)
    assert reconstruct(small).layer.kernel.out_sharding == ("in", "heads", None)


def test_layers_on_a_mesh_of_explicit_axes_run():
    mesh = jax.make_mesh((1,), ("out",), axis_types=(jax.sharding.AxisType.Explicit,))
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None, None, "out"))
    with jax.set_mesh(mesh):
        model = nnx.Sequential(make_conv(kernel_init=init), nnx.relu)
        small = decompose(model, {"layers/0": 12})
        x = jax.device_put(normal((2, 6, 6, 4)), PartitionSpec())
        found, expected = jax.jit(lambda models, x: [m(x) for m in models])((small, model), x)
    assert small.layers[0].kernel.horizontal.sharding.spec[-1] == "out"
    np.testing.assert_allclose(found, expected, atol=1e-4)


class Annotated(nnx.Module):
    """A module whose class tells what is data."""

    kernels: list = nnx.data()
    names: tuple = nnx.static()

    def __init__(self):
        self.kernels, self.names = [make_conv(features=4).kernel], ("a",)

    def __call__(self, x):
        for kernel in self.kernels:
            x = jax.lax.conv_general_dilated(
                x, kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return x


def test_kernels_in_the_containers_of_a_module_run_as_factors():
    model, x = Annotated(), normal((1, 6, 6, 4))
    small = decompose(model, {"kernels/0": 12})
    assert isinstance(small, SeparableConv) and small.names == ("a",)
    program = str(jax.make_jaxpr(lambda x: small(x))(x))
    assert program.count("conv_general_dilated[") == 2
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(small, x), model(x), atol=1e-4)
    assert type(reconstruct(small)) is Annotated


def test_a_tree_that_does_not_fit_the_model_is_refused():
    conv = nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0))
    small = variables_of(decompose(conv, {"kernel": 2}))
    wider = variables_of(decompose(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), {"kernel": 2}))
    assert lowrank_jax.nnx.rebuilt(conv, small)(jnp.ones((1, 5, 5, 4))).shape == (1, 5, 5, 8)
    with pytest.raises(ValueError, match=r"The model has no 'biass'; did you mean 'bias'"):
        lowrank_jax.nnx.rebuilt(conv, {**small, "biass": jnp.ones(8)})
    with pytest.raises(ValueError, match=r"kernel: the factors are of a kernel \(3, 3, 4, 6\)"):
        lowrank_jax.nnx.rebuilt(conv, {"kernel": wider["kernel"]})
