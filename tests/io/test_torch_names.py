"""PyTorch's tensors find their leaves by order and shape, and what does not fit is named."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.io.torch_names import from_torch
from lowrank_jax.program.call_order import call_order

RNG = np.random.default_rng(0)


class Block(nn.Module):
    """A residual block of equal width: its layers have the shapes of those of its neighbours."""

    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.BatchNorm(True)(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        return x + nn.BatchNorm(True)(nn.Conv(self.width, (3, 3), use_bias=False)(y))


class Net(nn.Module):
    """Names whose alphabetical order is not that of the forward pass, twelve equal blocks, two
    dense layers."""

    blocks: int = 12
    classes: int = 5
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, name="norm_of_stem")(nn.Conv(4, (3, 3), name="stem")(x))
        for _ in range(self.blocks):
            x = self.block(4)(x)
        x = nn.relu(nn.Dense(6, name="neck")(x.mean((1, 2))))
        return nn.Dense(self.classes, name="a_head")(x)


IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


def layer(name, *shape, bias=True):
    tensors = {f"{name}.weight": RNG.standard_normal(shape, np.float32)}
    return tensors | ({f"{name}.bias": RNG.standard_normal(shape[0], np.float32)} if bias else {})


def norm(name, size):
    statistics = {
        f"{name}.{leaf}": RNG.random(size, np.float32) + 1
        for leaf in ("running_mean", "running_var")
    }
    return {**layer(name, size), **statistics, f"{name}.num_batches_tracked": np.int64(7)}


def state_dict(blocks=12, classes=5, prefix=""):
    """What PyTorch would keep of `Net`, in the order in which its layers would be registered."""
    tensors = {**layer("conv", 4, 3, 3, 3), **norm("bn", 4)}
    for block in range(blocks):
        for index in (1, 2):
            tensors |= layer(f"blocks.{block}.conv{index}", 4, 4, 3, 3, bias=False)
            tensors |= norm(f"blocks.{block}.bn{index}", 4)
    tensors |= layer("fc1", 6, 4) | layer("fc2", classes, 6)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def skeleton(model, images=IMAGES):
    return jax.eval_shape(model.init, jax.random.key(0), images)


def convert(tensors, model, images=IMAGES, **options):
    return from_torch(tensors, model.apply, skeleton(model, images), images, **options)


def partners(report):
    return {pair.torch: pair.flax for pair in report.pairs}


@pytest.mark.parametrize("block", [Block, nn.remat(Block), nn.jit(Block)])
def test_layers_are_paired_in_the_order_of_the_forward_pass_whatever_they_are_called(block):
    model, tensors = Net(block=block), state_dict()
    variables, report = convert(tensors, model)
    assert report.complete
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, skeleton(model))
    found, name = (
        partners(report),
        next(key for key in variables["params"] if key.endswith("Block_2"))[: -len("_2")],
    )
    assert (
        found["conv.weight"] == "params/stem/kernel" and found["fc2.bias"] == "params/a_head/bias"
    )
    for index in range(12):
        assert found[f"blocks.{index}.conv2.weight"] == f"params/{name}_{index}/Conv_1/kernel"
        assert (
            found[f"blocks.{index}.bn1.running_var"]
            == f"batch_stats/{name}_{index}/BatchNorm_0/var"
        )
        kernel = variables["params"][f"{name}_{index}"]["Conv_0"]["kernel"]
        np.testing.assert_array_equal(
            kernel, tensors[f"blocks.{index}.conv1.weight"].transpose(2, 3, 1, 0)
        )


def backwards(tree):
    """The same tree of zeros, the keys of its dicts in the opposite order."""
    if isinstance(tree, dict):
        return {key: backwards(tree[key]) for key in reversed(tree)}
    return jnp.zeros(tree.shape, tree.dtype)


def test_neither_the_values_nor_the_order_of_the_keys_of_the_target_matter():
    model, tensors = Net(blocks=2), state_dict(2)
    found, _ = from_torch(tensors, model.apply, backwards(skeleton(model)), IMAGES)
    chex.assert_trees_all_equal(found, convert(tensors, model)[0])


@pytest.mark.parametrize("prefix", ["module.", "backbone.model."])
def test_names_do_not_matter(prefix):
    report = convert(state_dict(3, prefix=prefix), Net(blocks=3))[1]
    plain = convert(state_dict(3), Net(blocks=3))[1]
    assert list(partners(report).values()) == list(partners(plain).values())


def test_kinds_may_be_listed_one_after_the_other():
    tensors = state_dict(3)
    sizes = sorted(
        tensors, key=lambda name: "bn" in name
    )  # all convolutions and dense layers, then all norms
    moved = convert({name: tensors[name] for name in sizes}, Net(blocks=3))[0]
    chex.assert_trees_all_equal(moved, convert(tensors, Net(blocks=3))[0])


def test_counts_of_batches_are_ignored_and_types_are_those_of_the_target():
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in state_dict(1).items()}
    variables, report = convert(tensors, Net(blocks=1))
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    assert not any("num_batches" in pair.torch for pair in report.pairs)


@pytest.mark.parametrize(
    "size, per_group, groups, outputs",
    [((3,), 2, 1, 3), ((2, 3), 2, 3, 6), ((3, 3), 1, 4, 8), ((1, 2, 3), 2, 2, 4)],
)
def test_a_convolution_computes_what_pytorchs_does(size, per_group, groups, outputs):
    rank = len(size)
    x = jnp.asarray(RNG.standard_normal((2, *range(5, 5 + rank), per_group * groups)), jnp.float32)
    model = nn.Conv(outputs, size, padding="VALID", feature_group_count=groups)
    tensors = layer("conv", outputs, per_group, *size)
    expected = torch_conv(x, tensors, rank, feature_group_count=groups)
    found = jax.jit(model.apply)(convert(tensors, model, x)[0], x)
    np.testing.assert_allclose(found, jnp.moveaxis(expected, 1, -1), atol=1e-4)


def torch_conv(x, tensors, rank, **options):
    """The layer "conv" as PyTorch computes it, of (batch, *spatial, channels) to (batch, channels,
    *spatial)."""
    letters = "DHW"[-rank:]
    dims = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
    x, options = jnp.moveaxis(x, -1, 1), dict(dimension_numbers=dims, **options)
    y = jax.lax.conv_general_dilated(x, tensors["conv.weight"], (1,) * rank, "VALID", **options)
    return y + tensors["conv.bias"].reshape(-1, *(1,) * rank)


def flattening(move, between):
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = between(nn.Conv(5, (2,) * (x.ndim - 2), padding="VALID")(x))
            x = jnp.moveaxis(x, -1, 1) if move else x
            return nn.Dense(7)(between(x.reshape(x.shape[0], -1)))

    return Flat()


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 4, 5, 3), (2, 3, 4, 2, 3)])
@pytest.mark.parametrize(
    "move, between", [(False, nn.relu), (False, lambda x: 2 * x), (True, lambda x: x)]
)
def test_a_dense_layer_after_flattened_features_computes_what_pytorchs_does(shape, move, between):
    x = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    rank = len(shape) - 2
    features = 5 * int(np.prod([size - 1 for size in shape[1:-1]]))
    tensors = layer("conv", 5, 3, *(2,) * rank) | layer("fc", 7, features)
    y = between(torch_conv(x, tensors, rank)).reshape(len(x), -1)
    expected = between(y) @ tensors["fc.weight"].T + tensors["fc.bias"]
    model = flattening(move, between)
    variables, report = convert(tensors, model, x)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, x), expected, atol=1e-4)
    assert ("inputs C" in report.pairs[2].layout) is not move


def test_a_square_dense_layer_after_the_flattened_one_is_not_reordered():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(12)(nn.relu(nn.Dense(12)(x.reshape(len(x), -1))))

    tensors = layer("one", 12, 12) | layer("two", 12, 12)
    variables, report = convert(tensors, Flat(), jnp.ones((1, 2, 2, 3)))
    assert [pair.layout for pair in report.pairs][::2] == [
        "OI to IO, inputs CHW to HWC",
        "OI to IO",
    ]
    np.testing.assert_array_equal(
        variables["params"]["Dense_0"]["kernel"], tensors["two.weight"].T
    )  # made first


def test_a_kernel_of_another_shape_is_named_on_both_sides():
    tensors = state_dict(2)
    tensors["blocks.1.conv1.weight"] = np.ones((4, 4, 5, 5))
    with pytest.raises(ValueError) as error:
        convert(tensors, Net(blocks=2))
    first = r"1 PyTorch tensors \(first blocks.1.conv1.weight, 4x4x5x5\) and 1 Flax leaves "
    assert re.match(
        first + r"\(first params/Block_1/Conv_0/kernel, 3x3x4x4\) have no partner", str(error.value)
    )


def test_layers_in_another_order_are_refused_with_a_report():
    tensors = state_dict(1)
    order = sorted(tensors, key=lambda name: not name.startswith("fc2"))
    with pytest.raises(
        ValueError, match=r"fc. *\.weight.* params/.*/kernel.* list the tensors in its order"
    ) as error:
        convert({name: tensors[name] for name in order}, Net(blocks=1))
    assert "no partner" in str(error.value)


@pytest.mark.parametrize(
    "change, lost",
    [
        (lambda t: t | layer("aux", 9, 4, 1, 1), {"aux.weight", "aux.bias"}),
        (lambda t: layer("aux", 9, 4, 1, 1) | t, {"aux.weight", "aux.bias"}),
        (lambda t: t | {"anchors": np.ones(3)}, {"anchors"}),
        (lambda t: t | {"attention.in_proj_weight": np.ones((3, 3))}, {"attention.in_proj_weight"}),
    ],
)
def test_a_tensor_too_many_is_the_only_one_named(change, lost):
    with pytest.raises(ValueError, match="have no partner"):
        convert(change(state_dict(2)), Net(blocks=2))
    variables, report = convert(change(state_dict(2)), Net(blocks=2), strict=False)
    assert set(report.unmatched_torch) == lost and not report.unmatched_flax
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)


@pytest.mark.parametrize("name", ["conv.bias", "bn.running_mean", "fc1.weight"])
def test_a_tensor_too_few_leaves_its_layer_without_a_partner(name):
    tensors = state_dict(1)
    del tensors[name]
    _, report = convert(tensors, Net(blocks=1), strict=False)
    prefix = name.split(".")[0]
    assert all(lost.startswith(f"{prefix}.") for lost in report.unmatched_torch)
    assert {path.split("/")[1] for path in report.unmatched_flax} == {
        {"conv": "stem", "bn": "norm_of_stem", "fc1": "neck"}[prefix]
    }


def test_a_new_head_keeps_its_own_arrays_where_the_match_need_not_be_strict():
    model = Net(blocks=1, classes=100)
    initial = backwards(skeleton(model))
    variables, report = from_torch(state_dict(1), model.apply, initial, IMAGES, strict=False)
    assert list(report.unmatched_torch) == ["fc2.weight", "fc2.bias"]
    assert list(report.unmatched_flax) == ["params/a_head/kernel", "params/a_head/bias"]
    assert variables["params"]["a_head"]["kernel"] is initial["params"]["a_head"]["kernel"]
    assert not np.array_equal(
        variables["params"]["neck"]["kernel"], initial["params"]["neck"]["kernel"]
    )


def test_a_transposed_convolution_is_not_taken_for_one():
    model, images = nn.ConvTranspose(4, (3, 3), strides=(2, 2)), jnp.ones((1, 5, 5, 4))
    with pytest.raises(ValueError, match=r"first up.weight, 4x4x3x3.*first params/kernel, 3x3x4x4"):
        convert(layer("up", 4, 4, 3, 3), model, images)


@pytest.mark.parametrize("cut", [0, 3, 5])
def test_of_layers_that_differ_in_number_those_before_and_after_the_gap_are_paired(cut):
    names = [f"{index}" for index in range(6)]
    sizes = {name: int(name) + 1 for name in names}
    tensors = {f"{name}.weight": np.ones((sizes[name], 2, 1)) for name in names}
    kept = [name for name in names if name != names[cut]]
    variables = {
        name: {"kernel": jax.ShapeDtypeStruct((1, 2, sizes[name]), jnp.float32)} for name in kept
    }

    def apply(variables, x):
        return [x @ variables[name]["kernel"][0] for name in kept]

    _, report = from_torch(tensors, apply, variables, jnp.ones((1, 2)), strict=False)
    assert partners(report) == {f"{name}.weight": f"{name}/kernel" for name in kept}
    assert list(report.unmatched_torch) == [f"{cut}.weight"]


def test_a_layer_that_the_forward_pass_does_not_use_comes_last():
    def apply(variables, x):
        return x @ variables["b"]["kernel"] @ variables["c"]["kernel"]

    variables = {name: {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)} for name in "abc"}
    tensors = {f"{index}.weight": np.ones((3, 3)) for index in range(3)}
    assert list(partners(from_torch(tensors, apply, variables, jnp.ones((1, 3)))[1]).values()) == [
        "b/kernel", "c/kernel", "a/kernel",
    ]  # fmt: skip


def test_arguments_that_are_no_arrays_reach_the_model():
    class Trained(nn.Module):
        @nn.compact
        def __call__(self, x, train, *, scale=1):
            return nn.BatchNorm(not train)(x) * scale

    model = Trained()
    target = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, False), IMAGES)
    _, report = from_torch(norm("bn", 3), model.apply, target, IMAGES, False, scale=2)
    assert report.complete


def test_an_nnx_state_is_filled_as_a_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.stem(x))).mean((1, 2)))

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    tensors = layer("0", 4, 3, 3, 3) | norm("1", 4) | layer("2", 2, 4)
    filled, report = from_torch(
        tensors, lambda state, x: nnx.merge(graph, state)(x), state, jnp.ones((1, 8, 8, 3))
    )
    assert report.complete and partners(report)["1.running_mean"] == "norm/mean"
    model = nnx.merge(graph, filled)
    np.testing.assert_array_equal(model.head.kernel[...], tensors["2.weight"].T)
    assert model(jnp.ones((1, 8, 8, 3))).shape == (1, 2)


def test_the_report_is_a_table_with_what_has_no_partner_first():
    tensors = layer("conv", 4, 3, 3, 3) | layer("extra", 2, 2)
    _, report = convert(tensors, nn.Conv(4, (3, 3)), strict=False)
    lines = [re.split(r"\s{2,}", line) for line in str(report).splitlines()]
    assert lines[0] == ["PyTorch", "shape", "Flax", "shape", "layout"]
    assert lines[1] == ["extra.weight", "2x2", "no partner"]
    assert lines[3] == ["conv.weight", "4x3x3x3", "params/kernel", "3x3x3x4", "OIHW to HWIO"]


@given(st.permutations(range(6)))
@settings(max_examples=20)
def test_the_call_order_is_that_of_use_not_of_names(order):
    def apply(variables, x):
        for index in order:
            x = jax.jit(lambda x, kernel: jax.nn.relu(x @ kernel.astype(jnp.float32)))(
                x, variables[str(index)]
            )
        return x

    early = {str(index): jnp.ones((3, 3), jnp.bfloat16) for index in range(6)}
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), early)
    for variables in (early, cast):
        assert list(call_order(apply, variables, jnp.ones((1, 3))).position) == list(order)


def test_casting_all_parameters_first_does_not_hide_the_order():
    model = Net(blocks=2)

    def apply(variables, x):
        return model.apply(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables), x)

    variables, _ = from_torch(state_dict(2), apply, skeleton(model), IMAGES)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
