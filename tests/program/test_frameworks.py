"""Trees of other frameworks run decomposed; reconstruct gives the dense tree."""

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowrank_jax import Separable, decompose, lowrank, max_rank, reconstruct, trace
from lowrank_jax.models.imagenet import VGG16, ResNet50


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def conv(x, kernel, layout, padding):
    return jax.lax.conv_general_dilated(x, kernel, (2, 1), padding, dimension_numbers=layout)


def assert_close(found, expected):
    # Sums of some dozens of products of the order of 1, in another order.
    np.testing.assert_allclose(found, expected, atol=1e-4)


def apply_torch(tensors, x):
    """A layer of PyTorch's layout, written with jax.lax."""
    weight, bias = tensors["layer1.0.conv1.weight"], tensors["layer1.0.conv1.bias"]
    y = conv(x, weight, ("NCHW", "OIHW", "NCHW"), [(1, 1), (2, 2)])
    return y + bias[:, None, None]


def test_kernels_named_and_laid_out_as_in_pytorch():
    tensors = {"layer1.0.conv1.weight": normal(6, 4, 3, 5), "layer1.0.conv1.bias": normal(6)}
    small = decompose(tensors, {"layer1.0.conv1.weight": 3}, axes="OIHW")
    factors = small["layer1.0.conv1.weight"]
    shapes = {name: leaf.shape for name, leaf in factors.items()}
    assert shapes == {"vertical_OIHW": (3, 4, 3, 1), "horizontal_OIHW": (6, 3, 1, 5)}
    x, dense = normal(2, 4, 8, 8), reconstruct(small)
    chex.assert_trees_all_equal_shapes_and_dtypes(dense, tensors)
    assert_close(lowrank(apply_torch)(small, x), apply_torch(dense, x))


@pytest.mark.parametrize(
    "axes, shape", [("OIHW", (6, 4, 3, 5)), ("OIW", (6, 4, 3)), ("OIDHW", (6, 2, 2, 3, 2))]
)
@pytest.mark.parametrize("first", ["vertical", "horizontal"])
def test_full_rank_gives_the_kernel_back_in_every_layout(axes, shape, first):
    tree = {"conv": {"weight": normal(*shape)}}
    scheme = Separable(max_rank(shape, 2, axes, first), 2, axes, first)
    small = jax.jit(lambda tree: decompose(tree, {"conv": scheme}))(tree)
    # Rounding of an SVD and of a product of factors: some dozens of roundings.
    chex.assert_trees_all_close(reconstruct(small), tree, atol=1e-5)


def test_a_haiku_model_runs_decomposed():
    def forward(x):
        return hk.Conv2D(8, 3)(jax.nn.relu(hk.Conv2D(6, (3, 5), stride=2)(x)))

    model, x = hk.without_apply_rng(hk.transform(forward)), normal(2, 8, 8, 4)
    params = model.init(jax.random.key(0), x)
    found = trace(model.apply, params, x)
    assert sorted(found.safe_paths()) == ["conv2_d", "conv2_d_1"]
    small = decompose(params, trace=found)
    assert_close(lowrank(model.apply)(small, x), model.apply(reconstruct(small), x))


def test_an_equinox_model_is_traced_decomposed_and_run():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = [
        eqx.nn.Conv2d(4, 8, (3, 5), stride=(2, 1), key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(8, 8, 3, groups=2, key=keys[1]),
    ]
    model = eqx.nn.Sequential(layers)
    arrays, static = eqx.partition(model, eqx.is_array)

    def apply(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    x = normal(2, 4, 16, 16)
    found = trace(apply, arrays, x)
    assert [(each.path, each.axes, each.strides, each.groups) for each in found] == [
        ("layers/0", "OIHW", (2, 1), 1),
        ("layers/2", "OIHW", (1, 1), 2),
    ]
    small = decompose(arrays, trace=found)
    assert small.layers[0].weight["vertical_OIHW"].shape[1:] == (4, 3, 1)
    dense = reconstruct(small)
    chex.assert_trees_all_equal_shapes_and_dtypes(dense, arrays)
    assert_close(lowrank(apply)(small, x), apply(dense, x))


@pytest.mark.parametrize("axes", ["HW", "HHIO", "HWI", "IO", ""])
def test_a_layout_that_does_not_name_every_axis_once_is_refused(axes):
    with pytest.raises(ValueError, match="axes="):
        decompose({"conv": {"kernel": normal(3, 3, 4, 6)}}, {"conv": Separable(2, axes=axes)})


def test_published_macs_of_resnet_50_and_vgg_16():
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    resnet, vgg = ResNet50(), VGG16()
    uses = trace(resnet.apply, jax.eval_shape(resnet.init, jax.random.key(0), x), x)
    assert round(uses.macs / 1e9, 2) == 4.09 and len(uses.safe_paths()) == 53
    uses = trace(vgg.apply, jax.eval_shape(vgg.init, jax.random.key(0), x), x)
    convolutions = [use for use in uses if use.kind == "conv"]
    assert round(sum(use.macs for use in convolutions) / 1e9, 2) == 15.35
    assert round(sum(use.parameters for use in convolutions) / 1e6, 2) == 14.71


def test_the_authors_ranks_of_vgg_16_give_the_published_cost():
    ranks = [5, 24, 48, 48, 64, 128, 160, 192, 192, 256, 320, 320, 320]
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = VGG16(num_classes=None)
    uses = trace(model.apply, jax.eval_shape(model.init, jax.random.key(0), x), x)
    schemes = [use.scheme(rank) for use, rank in zip(uses, ranks, strict=True)]
    parameters = sum(use.parameters_at(scheme) for use, scheme in zip(uses, schemes, strict=True))
    macs = sum(use.macs_at(scheme) for use, scheme in zip(uses, schemes, strict=True))
    assert (round(parameters / 1e6, 2), round(uses.parameters / parameters, 3)) == (5.36, 2.745)
    assert (round(macs / 1e9, 2), round(uses.macs / macs, 2)) == (4.94, 3.1)


def test_a_kernel_in_two_layouts_has_the_same_factors():
    kernel = normal(3, 5, 4, 6)
    one = decompose({"kernel": kernel}, {"kernel": 2})["kernel"]
    two = decompose({"kernel": kernel.transpose(3, 2, 0, 1)}, {"kernel": 2}, axes="OIHW")["kernel"]
    # The same SVD of the same matrix.
    moved = one["vertical"].transpose(3, 2, 0, 1)
    np.testing.assert_allclose(moved, two["vertical_OIHW"], atol=1e-6)
