"""Models of NNX, decomposed: any container, sharing, stacks, transformations, checkpoints."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import lowrank_jax
from lowrank_jax import Separable, max_rank
from lowrank_jax.nnx import SeparableConv, decompose, functional, reconstruct, trace


def normal(shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def fill(key, shape, dtype=jnp.float32, **options):
    """An initialiser for which nothing has to be compiled."""
    deviation = np.sqrt(1 / np.prod(shape[:-1], initial=1))
    return jnp.asarray(np.random.default_rng(len(shape)).normal(0, deviation, shape), dtype)


def conv_of(*sizes, **options):
    return nnx.Conv(*sizes, kernel_init=fill, rngs=nnx.Rngs(0), **options)


def make_conv(features=8, channels=4, **options):
    return conv_of(channels, features, (3, 3), **options)


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@jax.jit
def run(model, x):
    return model(x)


@jax.jit
def run_all(models, x):
    return [model(x) for model in models]


def assert_same_function(*models, x):
    expected, *others = run_all(models, x)
    for found in others:
        np.testing.assert_allclose(found, expected, atol=1e-4)


class Bottleneck(nnx.Module):
    def __init__(self, inputs, width, stride):
        conv = functools.partial(conv_of, use_bias=False)
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5, rngs=nnx.Rngs(0))
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
    """Written as published collections write theirs: padding in numbers, lists, partials."""

    def __init__(self):
        self.stem = conv_of(3, 8, (7, 7), strides=2, padding=3, use_bias=False)
        self.stem_bn = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
        self.pool = functools.partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))
        blocks = [Bottleneck(8, 4, 1)], [Bottleneck(16, 8, 2), Bottleneck(32, 8, 1)]
        self.stages = nnx.List(nnx.List(stage) for stage in blocks)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.fc = nnx.Linear(32, 3, kernel_init=fill, rngs=nnx.Rngs(0))

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
    model = ResNet()
    model.eval()
    return model


@functools.cache
def table():
    return trace(resnet(), normal(IMAGES))


def arrays(model):
    leaves = jax.tree.leaves(nnx.state(model))
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [jax.random.key_data(x) if key else x for x, key in zip(leaves, keys, strict=True)]


def test_a_resnet_at_full_rank_computes_the_same_and_runs_in_training_mode():
    full = {x.path: max_rank(x.kernel_shape) for x in table() if x.path in RANKS}
    small = decompose(resnet(), full)
    assert type(small) is ResNet and len(table()) == 13
    assert_same_function(resnet(), small, x=normal(IMAGES))
    block = small.stages[1][1]
    small.train()
    nnx.jit(lambda block, x: block(x))(block, normal((2, 2, 2, 32)))
    assert not np.allclose(block.bn1.mean[...], 0)


def test_without_a_table_a_trace_halves_every_layer_of_a_resnet():
    small = decompose(resnet(), trace=table())
    before, after = (sum(x.size for x in jax.tree.leaves(params(m))) for m in (resnet(), small))
    assert 0.4 * before < after < 0.6 * before
    assert isinstance(small.stages[1][0].downsample.layers[0], SeparableConv)
    assert isinstance(small.fc, SeparableConv) and isinstance(small.fc, nnx.Linear)
    assert set(params(small)["fc"]["kernel"]) == {"left_factor", "right_factor"}
    assert run.eval_shape(small, normal(IMAGES)).shape == (2, 3)


def test_the_model_given_is_untouched():
    model = ResNet()
    objects = [id(node) for _, node in nnx.iter_graph(model)]
    before = [np.array(x) for x in arrays(model)]
    small = decompose(model, RANKS)
    small.fc.kernel[...] += 1
    small.stem_bn.mean[...] += 1
    small.stem.kernel.vertical[...] += 1
    assert [id(node) for _, node in nnx.iter_graph(model)] == objects
    chex.assert_trees_all_equal(arrays(model), before)
    before = [np.array(x) for x in arrays(small)]
    reconstruct(small).fc.kernel[...] += 1
    chex.assert_trees_all_equal(arrays(small), before)


def test_whatever_is_not_named_keeps_its_very_arrays():
    small, block = decompose(resnet(), RANKS), resnet().stages[0][0]
    assert small.fc.kernel.get_value() is resnet().fc.kernel.get_value()
    assert small.stages[0][0].conv1.kernel.get_value() is block.conv1.kernel.get_value()
    assert type(reconstruct(resnet()).stem) is nnx.Conv


def test_a_decomposed_model_can_be_decomposed_further_and_made_dense_again():
    small = decompose(decompose(resnet(), {"stem": 5}), {"stages/.*/conv1": 3})
    assert isinstance(small.stem, SeparableConv) and small.stem.kernel.vertical.shape[-1] == 5
    assert isinstance(small.stages[0][0].conv1, SeparableConv)
    dense = reconstruct(small)
    assert not any(isinstance(node, SeparableConv) for _, node in nnx.iter_graph(dense))
    chex.assert_trees_all_equal_shapes_and_dtypes(params(dense), params(resnet()))


def test_a_checkpoint_is_restored_through_eval_shape(tmp_path):
    small = decompose(resnet(), RANKS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "small", nnx.state(small))
    with ocp.StandardCheckpointer() as checkpointer:
        skeleton = nnx.eval_shape(lambda: decompose(ResNet(), RANKS))
        skeleton.eval()
        graphdef, state = nnx.split(skeleton)
        restored = nnx.merge(graphdef, checkpointer.restore(tmp_path / "small", state))
    chex.assert_trees_all_equal(arrays(restored), arrays(small))
    chex.assert_trees_all_equal(run(restored, normal(IMAGES)), run(small, normal(IMAGES)))


def test_reconstruct_works_on_shapes_too():
    skeleton = nnx.eval_shape(lambda: reconstruct(decompose(ResNet(), RANKS)))
    chex.assert_trees_all_equal_shapes_and_dtypes(params(skeleton), params(resnet()))


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_decompose_compiles(jit):
    model = nnx.Dict(conv=make_conv())
    small = jit(lambda model: decompose(model, {"conv": 12}))(model)
    x = normal((1, 6, 6, 4))
    np.testing.assert_allclose(small["conv"](x), model["conv"](x), atol=1e-4)


class Tied(nnx.Module):
    """A layer used twice, and another layer with the same kernel."""

    def __init__(self):
        self.blocks = nnx.List([nnx.Dict(conv=make_conv(4)), nnx.Dict(conv=make_conv(4))])
        self.again = self.blocks[1]
        self.strided = make_conv(4, strides=2)
        self.strided.kernel = self.blocks[0].conv.kernel

    def __call__(self, x):
        for block in [*self.blocks, self.again]:
            x = block.conv(x)
        return self.strided(x)


def test_layers_and_kernels_that_are_shared_stay_shared():
    model, x = Tied(), normal((1, 6, 6, 4))
    small = decompose(model, {"again/conv": 12, "blocks/0/conv": 12})
    assert isinstance(small.again.conv, SeparableConv) and small.again is small.blocks[1]
    assert isinstance(small.strided, SeparableConv)
    assert small.strided.kernel is small.blocks[0].conv.kernel
    assert small.strided.bias is not small.blocks[0].conv.bias
    dense = reconstruct(small)
    assert dense.again is dense.blocks[1]
    assert dense.strided.kernel is dense.blocks[0].conv.kernel
    assert_same_function(model, small, dense, x=x)


def test_a_trace_names_shared_kernels_by_their_first_path():
    calls = trace(Tied(), normal((1, 6, 6, 4)))
    assert [(call.path, call.strides, call.uses) for call in calls] == [
        ("blocks/0/conv", (1, 1), 1),
        ("again/conv", (1, 1), 2),
        ("blocks/0/conv", (2, 2), 1),
    ]
    small = decompose(Tied(), trace=calls)
    assert isinstance(small.strided, SeparableConv) and isinstance(small.again.conv, SeparableConv)


class Stack(nnx.Module):
    """A stack of layers, of which a scan runs one after the other."""

    def __init__(self):
        make = functools.partial(nnx.Conv, 4, 4, (3, 3), feature_group_count=2)
        make_one = lambda rngs: nnx.Sequential(make(rngs=rngs), nnx.tanh)  # noqa: E731
        self.layers = nnx.vmap(make_one, in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))

    def __call__(self, x):
        @nnx.remat
        def step(x, layer):
            return layer(x)

        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_layers_are_decomposed_slice_by_slice_and_run_in_scan_and_vmap():
    model, x = Stack(), normal((3, 2, 6, 6, 4))
    small = decompose(model, {"layers/layers/0": 6}, trace(model, x[0]))
    chex.assert_shape(small.layers.layers[0].kernel.vertical[...], (3, 3, 1, 2, 12))
    assert_same_function(model, small, reconstruct(small), x=x[0])
    both = nnx.jit(nnx.vmap(lambda layer, x: layer(x)))
    np.testing.assert_allclose(both(small.layers, x), both(model.layers, x), atol=1e-5)
    rank = Separable(2, 2)
    stacked = decompose(model, {"layers/layers/0": 2}).layers.layers[0].kernel[1]
    kernel = {"conv": model.layers.layers[0].kernel[1]}
    single = lowrank_jax.reconstruct(lowrank_jax.decompose(kernel, {"conv": rank}))["conv"]
    np.testing.assert_allclose(stacked, single, atol=1e-5)


class StackOfLines(nnx.Module):
    """Stacks of kernels that could be taken for others by their number of axes."""

    def __init__(self, joined):
        self.joined = joined
        stacked = lambda make: nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))  # noqa: E731
        self.products = stacked(lambda rngs: nnx.Linear(6, 6, rngs=rngs))
        self.lines = stacked(lambda rngs: nnx.Conv(6, 6, (3,), rngs=rngs))

    def __call__(self, x):
        def step(x, layer, line):
            return nnx.tanh(layer(line(x)))

        if self.joined:
            both = nnx.vmap(step, in_axes=(None, 0, 0), out_axes=0)
            return both(x, self.products, self.lines).sum(0)
        return nnx.scan(step, in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)(
            x, self.products, self.lines
        )


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_stacks_of_products_and_of_one_dimensional_convolutions_run(joined, traced):
    model, x = StackOfLines(joined), normal((2, 5, 6))
    found = trace(model, x) if traced else None
    small = decompose(model, {"products": 6, "lines": 6}, found)
    assert_same_function(model, small, reconstruct(small), x=x)


def test_products_that_share_a_factor_under_vmap_are_refused():
    make = lambda rngs: nnx.Linear(4, 4, rngs=rngs)  # noqa: E731
    model = Ensemble()
    model.heads, x = nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(2)), normal((3, 4))
    with pytest.raises(ValueError, match=r"heads: nnx.vmap maps these .* without a trace"):
        decompose(model, {"heads": 2}, trace(model, x))
    assert_same_function(model, decompose(model, {"heads": 4}), x=x)


class Ensemble(nnx.Module):
    """Heads under vmap, which all read the same images."""

    def __init__(self):
        make = lambda rngs: nnx.Conv(4, 4, (3, 3), rngs=rngs)  # noqa: E731
        self.heads = nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(2))

    def __call__(self, x):
        return nnx.vmap(lambda head, x: head(x), in_axes=(0, None), out_axes=-1)(self.heads, x)


def test_an_ensemble_under_vmap_runs_as_factors():
    model, x = Ensemble(), normal((2, 6, 6, 4))
    small = decompose(model, {"heads": 12}, trace(model, x))
    assert_same_function(model, small, x=x)
    assert str(jax.make_jaxpr(lambda m, x: m(x))(small, x)).count("conv_general_dilated[") == 2


class PlainList(nnx.Module, pytree=False):
    def __init__(self):
        self.convs = [make_conv(4), make_conv()]

    def __call__(self, x):
        return self.convs[1](self.convs[0](x))


class Holder(nnx.Module):
    def __init__(self, layers):
        self.layers = nnx.data(layers)

    def __call__(self, x):
        return jax.tree.leaves(self.layers, is_leaf=callable)[0](x)


CONTAINERS = [
    (lambda: nnx.Sequential(make_conv(), nnx.relu), "layers/0", lambda m: m.layers[0]),
    (lambda: Holder(nnx.List([make_conv()])), "layers/0", lambda m: m.layers[0]),
    (lambda: Holder(nnx.Dict(conv=make_conv())), "layers/conv", lambda m: m.layers.conv),
    (lambda: Holder([make_conv()]), "layers/0", lambda m: m.layers[0]),
    (lambda: Holder({"a": [make_conv()]}), "layers/a/0", lambda m: m.layers["a"][0]),
    (lambda: Holder((make_conv(),)), "layers/0", lambda m: m.layers[0]),
    (PlainList, "convs/1", lambda m: m.convs[1]),
    (make_conv, "kernel", lambda m: m),
]


@pytest.mark.parametrize("make, path, find", CONTAINERS)
def test_layers_in_every_container_are_found(make, path, find):
    model, x = make(), normal((1, 6, 6, 4))
    calls = trace(model, x)
    assert path in [call.path for call in calls]
    small = decompose(model, {path: 12}, calls)
    assert isinstance(find(small), SeparableConv) and type(find(model)) is nnx.Conv
    np.testing.assert_allclose(small(x), model(x), atol=1e-4)


def test_a_module_that_holds_its_parent_is_no_obstacle():
    model = nnx.Dict(conv=make_conv())
    model.child = nnx.Dict(parent=model)
    small = decompose(model, {"child/parent/conv|conv": 3})
    assert small.child.parent is small and isinstance(small.conv, SeparableConv)


def test_a_list_of_modules_is_decomposed():
    small = decompose([make_conv(), make_conv()], {"1": 3})
    assert [isinstance(layer, SeparableConv) for layer in small] == [False, True]


def test_a_trace_tells_the_facts_of_every_layer_dense_and_decomposed():
    layers = make_conv(feature_group_count=2, strides=2), nnx.Linear(8, 3, rngs=nnx.Rngs(0))
    model, x = nnx.Sequential(*layers), jax.ShapeDtypeStruct((2, 8, 8, 4), "float32")
    conv, linear = trace(nnx.eval_shape(lambda: nnx.clone(model)), x)
    facts = conv.path, conv.groups, conv.strides, conv.macs
    assert facts == ("layers/0", 2, (2, 2), 2 * 16 * 9 * 2 * 8)
    assert (linear.path, linear.kind, linear.safe) == ("layers/1", "product", True)
    one, two, _ = trace(decompose(model, {"layers/0": 2}), x)
    assert (one.path, two.path) == ("layers/0/vertical", "layers/0/horizontal")
    _, one, two = trace(decompose(model, {"layers/1": 2}), x)
    assert (one.path, two.path) == ("layers/1/left_factor", "layers/1/right_factor")


class Lonely(nnx.Module):
    def __init__(self):
        self.params = make_conv()

    def __call__(self, x):
        return self.params(x)


def test_a_module_may_be_called_params():
    calls = trace(Lonely(), normal((1, 6, 6, 4)))
    assert isinstance(decompose(Lonely(), trace=calls).params, SeparableConv)


def test_the_function_of_a_model_takes_dense_and_decomposed_variables():
    model, x = nnx.Sequential(make_conv(), nnx.relu), normal((1, 6, 6, 4))
    small = decompose(model, {"layers/0": 3})
    apply, variables = functional(model)
    own, factors = functional(small)
    chex.assert_trees_all_equal(factors, lowrank_jax.decompose(variables, {"layers/0": 3}))
    run = lowrank_jax.lowrank(apply)
    expected = small(x)
    np.testing.assert_allclose(run(factors, x), expected, atol=1e-5)
    np.testing.assert_allclose(run(nnx.state(small), x), expected, atol=1e-5)
    np.testing.assert_allclose(lowrank_jax.lowrank(own)(factors, x), expected, atol=1e-5)


class Normalised(nnx.Module):
    """A layer whose kernel is normalised by the module around it."""

    def __init__(self, kind):
        self.plain = make_conv(4)
        self.norm = kind(make_conv(), rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.norm(self.plain(x))


@pytest.mark.parametrize("kind", [nnx.WeightNorm, nnx.SpectralNorm])
def test_a_normalised_kernel_is_multiplied_back_and_refused_by_a_trace(kind):
    model, x = Normalised(kind), normal((1, 6, 6, 4))
    model.eval()
    path, calls = "norm/layer_instance", trace(model, x)
    small = decompose(model, {path: 12, "plain": 12})
    assert isinstance(small.norm, SeparableConv) and type(small.norm.layer_instance) is nnx.Conv
    assert_same_function(model, small, reconstruct(small), x=x)
    with pytest.raises(ValueError, match=f"{path}: cannot be decomposed: "):
        decompose(model, {path: 3}, calls)
    assert list(calls.half_parameters()) == ["plain"]


class Penalised(nnx.Module):
    def __init__(self):
        self.conv = make_conv()

    def __call__(self, x):
        return self.conv(x) + jnp.abs(self.conv.kernel[...]).sum()


def test_a_trace_refuses_a_kernel_that_the_program_also_reads_elsewhere():
    calls = trace(Penalised(), normal((1, 6, 6, 4)))
    with pytest.raises(ValueError, match="conv: cannot be decomposed: its kernel is also used by"):
        decompose(Penalised(), {"conv": 3}, calls)
    with pytest.raises(ValueError, match="No layer of the traced program"):
        decompose(Penalised(), trace=calls)


def with_kernel(change):
    conv = make_conv()
    conv.kernel = nnx.Param(change(conv.kernel[...]))
    return nnx.Dict(layer=conv)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: nnx.Dict(layer=nnx.Param(jnp.ones(4))), "not the kernel of a layer"),
        (lambda: with_kernel(lambda kernel: kernel * jnp.nan), "NaN or infinite"),
        (lambda: with_kernel(lambda kernel: kernel.astype(jnp.int8)), "the kernel has type int8"),
        (lambda: nnx.eval_shape(lambda: nnx.Dict(layer=make_conv())), "a shape but no values"),
    ],
)
def test_a_kernel_that_cannot_be_decomposed_is_refused(make, reason):
    with pytest.raises(ValueError, match=f"layer: .*{reason}"):
        decompose(make(), {"layer": 3})


@pytest.mark.parametrize(
    "ranks, message",
    [
        ({"stages/0/0/conv": 3}, "did you mean 'stages/0/0/conv2' or 'stages/0/0/conv1'"),
        ({"stem": 22}, r"stem: rank 22 is not allowed; give an int from 1 to 21"),
        ({"stem": True}, "stem: rank True"),
        ({"stem": Separable(3, groups=2)}, r"stem: Separable\(rank=3, groups=2.*does not fit"),
        ({}, "table of ranks is empty"),
        (None, "There is no table of ranks"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(ranks, message):
    with pytest.raises(ValueError, match=message):
        decompose(resnet(), ranks)


def test_a_layer_that_is_decomposed_already_is_refused():
    with pytest.raises(ValueError, match=r"'stem' is decomposed already; call reconstruct"):
        decompose(decompose(resnet(), RANKS), {"stem": 2})


@pytest.mark.parametrize("model", [[make_conv()], nnx.Dict(conv=make_conv()), lambda x: x])
def test_what_cannot_be_called_as_a_module_is_not_traced(model):
    with pytest.raises(ValueError, match=r"is not allowed; give an nnx\.Module that can be called"):
        trace(model, normal((1, 6, 6, 4)))
