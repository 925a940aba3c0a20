"""NNX models with their convolutions replaced: same function, same tree as Linen's, the model given
untouched."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import lowrank_jax
from lowrank_jax import Separable, max_rank
from lowrank_jax.nnx import SeparableConv, decompose, reconstruct, trace


def normal(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def make_conv(kind=nnx.Conv, kernel_size=(3, 3), channels=4, features=8, **options):
    options |= {"bias_init": nnx.initializers.normal(1.0), "rngs": nnx.Rngs(0)}
    return kind(channels, features, kernel_size, **options)


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@jax.jit
def run(model, x):
    return model(x)


def assert_same_function(model, *others, x, dtype=None):
    expected, *found = jax.jit(lambda models, x: [model(x) for model in models])(
        (model, *others), x
    )
    # Sums of tens of terms, both factors and the channels between them rounded to the coarsest type
    # in use.
    types = [
        dtype or "float32",
        expected.dtype,
        *(leaf.dtype for leaf in jax.tree.leaves(params(model))),
    ]
    eps = max(float(jnp.finfo(kind).eps) for kind in types)
    scale = np.abs(np.asarray(expected, np.float64)).max()
    assert scale > 0.1
    for array in found:
        chex.assert_trees_all_equal_shapes_and_dtypes(array, expected)
        np.testing.assert_allclose(np.float64(array), np.float64(expected), atol=20 * eps * scale)


def assert_exact_at_full_rank(layer, x, first="vertical"):
    groups, axes = (
        getattr(layer, "feature_group_count", 1),
        {3: "WIO", 4: "HWIO", 5: "DHWIO"}[layer.kernel.ndim],
    )
    rank = max_rank(layer.kernel.shape, groups, axes, first)
    small = decompose(nnx.Dict(layer=layer), {"layer": Separable(rank, groups, axes, first)})[
        "layer"
    ]
    dense = reconstruct(small)
    assert type(dense) is type(layer) and dense.kernel_shape == layer.kernel_shape
    chex.assert_trees_all_equal_shapes_and_dtypes(params(dense), params(layer))
    assert_same_function(layer, small, dense, x=x, dtype=layer.dtype)


OPTIONS = [
    {},
    {"strides": 2, "padding": "VALID"},
    {"strides": (2, 1), "padding": "CIRCULAR"},
    {"padding": "REFLECT", "kernel_size": (2, 4)},
    {"padding": [(1, 2), (0, 3)], "strides": [1, 2]},
    {"padding": 1, "strides": None},
    {"padding": (2, 1), "use_bias": False},
    {"kernel_dilation": 2, "padding": "SAME_LOWER"},
    {"kernel_dilation": (2, 1), "padding": "CIRCULAR"},
    {"input_dilation": (1, 2), "padding": [(1, 2), (0, 3)]},
    {"feature_group_count": 2, "strides": 2},
    {"feature_group_count": 4, "use_bias": False},
    {"kernel_size": (1, 1), "precision": "highest"},
    {"dtype": "bfloat16"},
    {"param_dtype": jnp.float16},
    {"param_dtype": jnp.bfloat16, "dtype": "float32"},
    {"dtype": "bfloat16", "preferred_element_type": "float32"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_at_full_rank_a_layer_computes_what_the_dense_one_does(options):
    assert_exact_at_full_rank(make_conv(**options), normal((2, 9, 7, 4)))


@pytest.mark.parametrize(
    "options", [{}, {"strides": (1, 2), "padding": [(1, 0), (2, 1)], "feature_group_count": 2}]
)
def test_the_horizontal_convolution_can_come_first(options):
    assert_exact_at_full_rank(
        make_conv(kernel_size=(3, 2), **options), normal((2, 9, 7, 4)), "horizontal"
    )


@pytest.mark.parametrize(
    "size, options",
    [
        (3, {"strides": 2}),
        ((4,), {"padding": "CAUSAL", "kernel_dilation": 2}),
        ((3,), {"padding": "CIRCULAR", "feature_group_count": 2}),
        ((3, 2, 2), {"strides": (1, 2, 1)}),
        ((2, 3, 1), {"padding": "CIRCULAR", "use_bias": False}),
    ],
)
def test_one_and_three_dimensions(size, options):
    layer = make_conv(kernel_size=size, **options)
    assert_exact_at_full_rank(layer, normal((2, *(6, 5, 4)[: len(layer.kernel_size)], 4)))


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_dimensions(batch):
    assert_exact_at_full_rank(make_conv(), normal((*batch, 6, 5, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": (2, 1), "kernel_size": (3, 2)},
        {"strides": 2, "padding": "CIRCULAR"},
        {"strides": (1, 2), "padding": [(1, 2), (0, 1)], "use_bias": False},
        {"kernel_dilation": (1, 2), "padding": "VALID"},
        {"kernel_size": (3,), "strides": (2,)},
    ],
    ids=str,
)
def test_transposed_convolutions(options):
    layer = make_conv(nnx.ConvTranspose, **options)
    assert_exact_at_full_rank(layer, normal((2, *(6, 5)[: len(layer.kernel_size)], 4)))


def test_below_full_rank_it_computes_the_convolution_with_the_reconstructed_kernel():
    small = decompose(nnx.List([make_conv(strides=(1, 2))]), {"0": 3})[0]
    assert_same_function(reconstruct(small), small, x=normal((2, 6, 6, 4)))


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_state_is_the_tree_that_decompose_gives_for_linen(first, use_bias):
    model = nnx.Dict(conv=make_conv(use_bias=use_bias), head=nnx.Linear(8, 2, rngs=nnx.Rngs(0)))
    ranks = {"conv": Separable(3, first=first)}
    chex.assert_trees_all_equal(
        params(decompose(model, ranks)), lowrank_jax.decompose(params(model), ranks)
    )
    linen = lowrank_jax.SeparableConv(8, (3, 3), 3, use_bias=use_bias, first=first)
    variables = jax.eval_shape(linen.init, jax.random.key(0), jnp.zeros((1, 5, 5, 4)))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        params(decompose(model, ranks)["conv"]), variables["params"]
    )


class Bottleneck(nnx.Module):
    def __init__(self, inputs, width, stride, *, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.conv0, self.bn0 = conv(inputs, width, (1, 1)), norm(width)
        self.conv1, self.bn1 = conv(width, width, (3, 3), strides=stride, padding=1), norm(width)
        self.conv2, self.bn2 = conv(width, 4 * width, (1, 1)), norm(4 * width)
        shortcut = nnx.Sequential(conv(inputs, 4 * width, (1, 1), strides=stride), norm(4 * width))
        self.downsample = shortcut if stride != 1 or inputs != 4 * width else None

    def __call__(self, x):
        y = nnx.relu(self.bn0(self.conv0(x)))
        y = nnx.relu(self.bn1(self.conv1(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return nnx.relu(self.bn2(self.conv2(y)) + shortcut)


class ResNet(nnx.Module):
    """Written as the published NNX collections write theirs: padding in numbers, lists of stages,
    partials."""

    def __init__(self, widths=(4, 8), depths=(1, 2), classes=3, *, rngs):
        self.stem = nnx.Conv(3, 8, (7, 7), strides=2, padding=3, use_bias=False, rngs=rngs)
        self.stem_bn = nnx.BatchNorm(8, rngs=rngs)
        self.pool = functools.partial(
            nnx.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1))
        )
        inputs, self.stages = 8, nnx.List()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = nnx.List()
            for block in range(depth):
                blocks.append(Bottleneck(inputs, width, 2 if stage and not block else 1, rngs=rngs))
                inputs = 4 * width
            self.stages.append(blocks)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x):
        x = self.pool(nnx.relu(self.stem_bn(self.stem(x))))
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.fc(self.dropout(x.mean((1, 2))))


IMAGES = (2, 16, 16, 3)
RANKS = {"stem": 5, "stages/1/1/conv1": 3, "stages/1/0/downsample/layers/0": 2}


@functools.cache
def resnet():
    """A ResNet with statistics of its own, in evaluation mode."""
    model = ResNet(rngs=nnx.Rngs(0))
    nnx.jit(lambda model, x: model(x))(model, normal(IMAGES))
    model.eval()
    return model


def test_a_resnet_at_full_rank_computes_the_same_and_runs_in_training_mode():
    uses = trace(resnet(), normal(IMAGES))
    small = decompose(
        resnet(), {use.path: max_rank(use.kernel_shape) for use in uses if use.path in RANKS}
    )
    assert type(small) is ResNet and len(uses) == 13
    assert_same_function(resnet(), small, x=normal(IMAGES))
    before = small.stages[1][1].bn1.mean[...]
    small.train()
    nnx.jit(lambda model, x: model(x))(small, normal(IMAGES))
    assert not np.allclose(before, small.stages[1][1].bn1.mean[...])


def test_without_a_table_a_trace_halves_every_convolution_of_a_resnet():
    small = decompose(resnet(), trace=trace(resnet(), normal(IMAGES)))
    before, after = (
        sum(x.size for x in jax.tree.leaves(params(model))) for model in (resnet(), small)
    )
    assert 0.4 * before < after < 0.6 * before
    assert (
        type(small.stages[1][0].downsample.layers[0]) is SeparableConv
        and type(small.fc) is nnx.Linear
    )
    assert run(small, normal(IMAGES)).shape == (2, 3)


def arrays(model):
    leaves = jax.tree.leaves(nnx.state(model))
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]


def test_the_model_given_is_untouched():
    model = ResNet(rngs=nnx.Rngs(0))
    objects, before = (
        [id(node) for _, node in nnx.iter_graph(model)],
        [np.array(x) for x in arrays(model)],
    )
    small = decompose(model, RANKS)
    small.fc.kernel[...] += 1
    small.stem_bn.mean[...] += 1
    small.stem.vertical.kernel[...] += 1
    assert [id(node) for _, node in nnx.iter_graph(model)] == objects
    chex.assert_trees_all_equal(arrays(model), before)
    before = [np.array(x) for x in arrays(small)]
    reconstruct(small).fc.kernel[...] += 1
    chex.assert_trees_all_equal(arrays(small), before)


def test_whatever_is_not_named_keeps_its_very_arrays():
    small = decompose(resnet(), RANKS)
    assert small.fc.kernel.get_value() is resnet().fc.kernel.get_value()
    assert (
        small.stages[0][0].conv1.kernel.get_value()
        is resnet().stages[0][0].conv1.kernel.get_value()
    )
    assert type(reconstruct(resnet()).stem) is nnx.Conv


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List(
            [nnx.Dict(conv=make_conv(features=4)), nnx.Dict(conv=make_conv(features=4))]
        )
        self.again = self.blocks[1]
        self.strided = make_conv(features=4, strides=2)
        self.strided.kernel = self.blocks[0].conv.kernel  # another layer with the same kernel

    def __call__(self, x):
        for block in [*self.blocks, self.again]:
            x = block.conv(x)
        return self.strided(x)


@pytest.mark.parametrize("path", ["blocks/1/conv", "again/conv"])
def test_a_layer_used_in_two_places_stays_one_and_is_named_by_either_path(path):
    model = Tied(nnx.Rngs(0))
    small = decompose(model, {path: 12})
    assert type(small.again.conv) is SeparableConv and small.again is small.blocks[1]
    assert_same_function(model, small, x=normal((1, 6, 6, 4)))
    dense = reconstruct(small)
    assert dense.again is dense.blocks[1]


@pytest.mark.parametrize("path", ["blocks/0/conv", "strided"])
def test_layers_that_share_a_kernel_share_its_factors(path):
    model = Tied(nnx.Rngs(0))
    small = decompose(model, {path: 12})
    assert small.strided.vertical.kernel is small.blocks[0].conv.vertical.kernel
    assert small.strided.horizontal.bias is not small.blocks[0].conv.horizontal.bias
    assert_same_function(model, small, x=normal((1, 6, 6, 4)))
    dense = reconstruct(small)
    assert dense.strided.kernel is dense.blocks[0].conv.kernel
    chex.assert_trees_all_equal_shapes(params(dense), params(model))


def test_a_trace_names_shared_kernels_by_their_first_path():
    model, x = Tied(nnx.Rngs(0)), normal((1, 6, 6, 4))
    uses = trace(model, x)
    assert [(use.path, use.strides, use.uses) for use in uses] == [
        ("blocks/0/conv", (1, 1), 1), ("again/conv", (1, 1), 2), ("blocks/0/conv", (2, 2), 1)]  # fmt: skip
    small = decompose(model, trace=uses)
    assert {type(layer) for layer in (small.strided, small.again.conv)} == {SeparableConv}
    chex.assert_trees_all_equal(
        params(decompose(model, {"strided": 3}, uses)), params(decompose(model, {"strided": 3}))
    )


def test_a_kernel_named_by_two_paths_is_refused():
    with pytest.raises(
        ValueError, match="strided: the table names this kernel twice, also as 'blocks/0/conv'"
    ):
        decompose(Tied(nnx.Rngs(0)), {"blocks/0/conv": 3, "strided": 4})


class Stack(nnx.Module):
    def __init__(self, make, rngs):
        self.layers = nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


def make_block(rngs):
    return nnx.Sequential(nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs), nnx.tanh)


def test_stacked_layers_are_decomposed_slice_by_slice_and_run_in_scan_and_vmap():
    model, x = Stack(make_block, nnx.Rngs(0)), normal((3, 2, 6, 6, 4))
    small = decompose(model, {"layers/layers/0": 6}, trace(model, x[0]))
    chex.assert_shape(small.layers.layers[0].vertical.kernel[...], (3, 3, 1, 2, 12))
    assert_same_function(model, small, x=x[0])
    both = nnx.vmap(lambda layer, x: layer(x))
    np.testing.assert_allclose(both(small.layers, x), both(model.layers, x), atol=1e-5)
    chex.assert_trees_all_equal_shapes(params(reconstruct(small)), params(model))
    stacked = params(decompose(model, {"layers/layers/0": 2}))["layers"]["layers"][0]
    kernel = params(model)["layers"]["layers"][0]["kernel"][1]
    single = lowrank_jax.decompose({"conv": {"kernel": kernel}}, {"conv": Separable(2, 2)})["conv"]
    np.testing.assert_allclose(
        lowrank_jax.merge(*(stacked[name]["kernel"][1] for name in ("vertical", "horizontal"))),
        lowrank_jax.merge(*(single[name]["kernel"] for name in ("vertical", "horizontal"))),
        atol=1e-5,
    )


def test_a_checkpoint_is_restored_through_eval_shape(tmp_path):
    small = decompose(resnet(), RANKS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "small", nnx.state(small))
    with ocp.StandardCheckpointer() as checkpointer:
        skeleton = nnx.eval_shape(lambda: decompose(ResNet(rngs=nnx.Rngs(1)), RANKS))
        skeleton.eval()
        graphdef, state = nnx.split(skeleton)
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "small", state))
    chex.assert_trees_all_equal(arrays(restored), arrays(small))
    chex.assert_trees_all_equal(run(restored, normal(IMAGES)), run(small, normal(IMAGES)))


def test_reconstruct_works_on_shapes_too():
    skeleton = nnx.eval_shape(lambda: reconstruct(decompose(ResNet(rngs=nnx.Rngs(1)), RANKS)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params(skeleton), params(resnet()))


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_decompose_compiles(jit):
    model = nnx.Dict(conv=make_conv())
    small = jit(lambda model: decompose(model, {"conv": 12}))(model)
    assert_same_function(model["conv"], small["conv"], x=normal((1, 6, 6, 4)))


def test_gradients_reach_both_factors_and_a_step_lowers_the_loss():
    small, x = (
        decompose(nnx.Sequential(make_conv(), nnx.relu), {"layers/0": 3}),
        normal((2, 6, 6, 4)),
    )

    def loss(model):
        return ((model(x) - 1) ** 2).mean()

    optimizer = nnx.Optimizer(small, optax.sgd(0.01), wrt=nnx.Param)
    before, gradients = nnx.value_and_grad(loss)(small)
    chex.assert_trees_all_equal_shapes(gradients, nnx.state(small, nnx.Param))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    optimizer.update(small, gradients)
    assert loss(small) < before


class ByHand(nnx.Module):
    def __init__(self, rngs):
        self.vertical = nnx.Conv(4, 3, (3, 1), strides=(2, 1), use_bias=False, rngs=rngs)
        self.horizontal = nnx.Conv(3, 8, (1, 3), strides=(1, 2), rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.horizontal(self.vertical(x)))


def test_the_compiled_program_costs_what_one_written_by_hand_does():
    x = normal((2, 8, 8, 4))
    small = decompose(nnx.Sequential(make_conv(strides=2), nnx.relu), {"layers/0": 3})
    flops = [
        run.lower(m, x).compile().cost_analysis()["flops"] for m in (small, ByHand(nnx.Rngs(0)))
    ]
    assert flops[0] == flops[1]


class PlainList(nnx.Module, pytree=False):
    def __init__(self):
        self.convs = [make_conv(features=4), make_conv()]

    def __call__(self, x):
        return self.convs[1](self.convs[0](x))


class Holder(nnx.Module):
    def __init__(self, layers):
        self.layers = nnx.data(layers)

    def __call__(self, x):
        return jax.tree.leaves(self.layers, is_leaf=callable)[0](x)


@pytest.mark.parametrize(
    "model, path, find",
    [
        (nnx.Sequential(make_conv(), nnx.relu), "layers/0", lambda m: m.layers[0]),
        (Holder(nnx.List([make_conv()])), "layers/0", lambda m: m.layers[0]),
        (Holder(nnx.Dict(conv=make_conv())), "layers/conv", lambda m: m.layers.conv),
        (Holder([make_conv()]), "layers/0", lambda m: m.layers[0]),
        (Holder({"a": [make_conv()]}), "layers/a/0", lambda m: m.layers["a"][0]),
        (Holder((make_conv(),)), "layers/0", lambda m: m.layers[0]),
        (PlainList(), "convs/1", lambda m: m.convs[1]),
        (make_conv(), "", lambda m: m),
    ],
)
def test_layers_in_every_container_are_found(model, path, find):
    x = normal((1, 6, 6, 4))
    uses = trace(model, x)
    assert path in [use.path for use in uses]
    small = decompose(model, {path: 12}, uses)
    assert type(find(small)) is SeparableConv and type(find(model)) is nnx.Conv
    np.testing.assert_allclose(small(x), model(x), atol=1e-4)


def test_a_module_that_holds_its_parent_is_no_obstacle():
    model = nnx.Dict(conv=make_conv())
    model.child = nnx.Dict(parent=model)
    small = decompose(model, {"child/parent/conv": 3})
    assert small.child.parent is small and type(small.conv) is SeparableConv


def test_a_list_of_modules_is_a_model():
    small = decompose([make_conv(), make_conv()], {"1": 3})
    assert [type(layer) for layer in small] == [nnx.Conv, SeparableConv]


def test_a_trace_tells_the_facts_of_every_layer():
    model = nnx.eval_shape(lambda: nnx.Dict(params=make_conv(feature_group_count=2, strides=2)))
    model = nnx.Sequential(model["params"], nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    conv, linear = trace(model, jax.ShapeDtypeStruct((2, 8, 8, 4), "float32"))
    assert (conv.path, conv.groups, conv.strides, conv.macs) == (
        "layers/0",
        2,
        (2, 2),
        2 * 16 * 9 * 2 * 8,
    )
    assert (linear.path, linear.kind, linear.safe) == ("layers/1", "product", False)


class Lonely(nnx.Module):
    def __init__(self):
        self.params = make_conv()

    def __call__(self, x):
        return self.params(x)


def test_a_module_may_be_called_params():
    uses = trace(Lonely(), normal((1, 6, 6, 4)))
    assert type(decompose(Lonely(), trace=uses).params) is SeparableConv


def test_other_arguments_of_the_call_reach_the_second_convolution():
    small = decompose(make_conv(), {"": 3})
    chex.assert_trees_all_equal(
        small(normal((1, 6, 6, 4)), out_sharding=None), small(normal((1, 6, 6, 4)))
    )


def test_variables_keep_their_kind_and_their_metadata():
    class Frozen(nnx.Param):
        pass

    model = nnx.Dict(conv=make_conv())
    model.conv.kernel = Frozen(model.conv.kernel[...], note="pretrained")
    small = decompose(model, {"conv": 3}).conv
    for factor in (small.vertical.kernel, small.horizontal.kernel):
        assert type(factor) is Frozen and factor.note == "pretrained"


def test_the_axis_between_the_factors_is_not_sharded():
    conv = make_conv()
    conv.kernel.set_metadata(out_sharding=(None, None, "in", "out"))
    small = decompose(conv, {"": 3})
    assert small.vertical.kernel.out_sharding == (None, None, "in", None)
    assert small.horizontal.kernel.out_sharding == (None, None, None, "out")
    assert nnx.get_partition_spec(nnx.state(small))["vertical"][
        "kernel"
    ].get_value() == PartitionSpec(None, None, "in", None)
    assert reconstruct(small).kernel.out_sharding == (None, None, "in", "out")


class Standardised(nnx.Conv):
    def __call__(self, inputs):
        return super().__call__(inputs) - self.kernel[...].mean()


class Halved(nnx.Param):
    def get_value(self, **options):
        return super().get_value(**options) / 2


class Copycat(nnx.Module):
    def __init__(self, conv):
        self.conv, self.weight = conv, conv.kernel


def altered(change):
    conv = make_conv()
    change(conv)
    return conv


def set_kernel(make):
    return lambda conv: setattr(conv, "kernel", make(conv.kernel[...]))


REFUSED = [
    (make_conv(Standardised), "it is a Standardised, no plain nnx.Conv"),
    (
        make_conv(mask=np.ones((3, 3, 4, 8), np.float32)),
        "it masks its kernel; multiply the kernel by the mask",
    ),
    (
        make_conv(conv_general_dilated=functools.partial(jax.lax.conv_general_dilated)),
        "its own convolution function",
    ),
    (make_conv(nnx.ConvTranspose, transpose_kernel=True), "transpose_kernel=True flips its kernel"),
    (make_conv(kernel_size=(2, 2, 2, 2)), "one to three spatial axes"),
    (nnx.Linear(4, 8, rngs=nnx.Rngs(0)), "it is a Linear, no plain nnx.Conv"),
    (Copycat(make_conv()), "'layer' holds its kernel, too, and it is a Copycat"),
    (altered(set_kernel(Halved)), "its kernel is a Halved whose value is changed when it is read"),
    (
        altered(set_kernel(lambda kernel: nnx.Param(kernel[..., :5]))),
        r"its kernel \(3, 3, 4, 5\) is no \(3, 3, 4, 8\)",
    ),
    (
        altered(lambda conv: setattr(conv, "lora", nnx.Param(jnp.ones(3)))),
        r"it also holds \['lora'\]",
    ),
    (altered(set_kernel(lambda kernel: nnx.Param(kernel * jnp.nan))), "NaN or infinite"),
    (nnx.eval_shape(make_conv), "a shape but no values; call decompose within"),
]


@pytest.mark.parametrize("layer, reason", REFUSED)
def test_a_layer_that_may_do_something_else_is_refused(layer, reason):
    path = "layer/conv" if type(layer) is Copycat else "layer"
    with pytest.raises(ValueError, match=f"^{path}: .*{reason}"):
        decompose(nnx.Dict(layer=layer), {path: 3})


def test_a_stack_along_another_axis_than_the_first_is_refused():
    model = nnx.vmap(make_block, in_axes=0, out_axes=1)(nnx.Rngs(0).split(5))
    with pytest.raises(
        ValueError, match=r"layers/0: .*its kernel \(3, 5, 3, 2, 4\) is no \(3, 3, 2, 4\)"
    ):
        decompose(model, {"layers/0": 3})


def test_a_kernel_shared_by_layers_of_different_groups_is_refused():
    model = nnx.Dict(one=make_conv(), two=make_conv(channels=8, feature_group_count=2))
    model.two.kernel = model.one.kernel
    with pytest.raises(
        ValueError, match=r"one: .*'two' holds its kernel, too, and it has 2 groups, not 1"
    ):
        decompose(model, {"one": 3})


class Penalised(nnx.Module):
    def __init__(self):
        self.conv, self.other = make_conv(), make_conv(Standardised, features=8, channels=8)

    def __call__(self, x):
        return self.other(self.conv(x)) + jnp.abs(self.conv.kernel[...]).sum()


def test_a_trace_refuses_a_kernel_that_the_program_also_uses_elsewhere():
    uses = trace(Penalised(), normal((1, 6, 6, 4)))
    with pytest.raises(
        ValueError, match="conv: cannot be decomposed: its kernel is also used by abs"
    ):
        decompose(Penalised(), {"conv": 3}, uses)
    with pytest.raises(ValueError, match="No layer of the traced program"):
        decompose(Penalised(), trace=uses)


def test_without_a_table_layers_of_other_kinds_are_left_alone():
    model = nnx.Sequential(make_conv(), make_conv(type("Own", (nnx.Conv,), {}), channels=8))
    small = decompose(model, trace=trace(model, normal((1, 6, 6, 4))))
    assert [type(layer).__name__ for layer in small.layers] == ["SeparableConv", "Own"]
    model = nnx.Sequential(model.layers[1])
    with pytest.raises(ValueError, match="table of ranks is empty"):
        decompose(model, trace=trace(model, normal((1, 6, 6, 8))))


@pytest.mark.parametrize(
    "ranks, message",
    [
        ({"stages/0/0/conv": 3}, "did you mean 'stages/0/0/conv2' or 'stages/0/0/conv1'"),
        ({"stem_bn": 3}, "No layer with a kernel at 'stem_bn'"),
        ({"stem": 22}, r"stem: rank 22 is not allowed; give an int from 1 to 21"),
        ({"stem": True}, "stem: rank True"),
        (
            {"stem": Separable(3, groups=2)},
            r"stem: Separable\(rank=3, groups=2.*does not fit the layer, where groups=1",
        ),
        ({}, "The table of ranks is empty"),
        (None, "The table of ranks is empty"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        decompose(resnet(), ranks)


def test_a_layer_that_is_decomposed_already_is_refused():
    with pytest.raises(ValueError, match=r"'stem' is decomposed already; call reconstruct"):
        decompose(decompose(resnet(), RANKS), {"stem": 2})
