"""Trees of other frameworks: the layout is declared once, and reconstruct gives the dense tree
back."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax import Separable, decompose, max_rank, reconstruct, trace
from lowrank_jax.models.imagenet import VGG16, ResNet50
from lowrank_jax.tree.pytrees import from_dict, to_dict


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def conv(x, kernel, layout, padding):
    return jax.lax.conv_general_dilated(x, kernel, (2, 1), padding, dimension_numbers=layout)


def assert_close(found, expected):
    # Sums of some dozens of products of the order of 1, in another order.
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_kernels_named_and_laid_out_as_in_pytorch():
    tensors = {
        "layer1.0.conv1.weight": normal(6, 4, 3, 5),
        "layer1.0.conv1.bias": normal(6),
        "fc.weight": normal(7, 6),
    }
    options = {"axes": "OIHW", "leaves": ("weight", "bias")}
    tree = unflatten_dict(tensors, sep=".")
    small = decompose(tree, {"layer1/0/conv1": 3}, **options)
    shapes = {name: leaf.shape for name, leaf in flatten_dict(small, sep=".").items()}
    assert shapes == {
        "layer1.0.conv1.vertical.weight": (3, 4, 3, 1),
        "layer1.0.conv1.horizontal.weight": (6, 3, 1, 5),
        "layer1.0.conv1.horizontal.bias": (6,),
        "fc.weight": (7, 6),
    }
    dense = flatten_dict(reconstruct(small, **options), sep=".")
    chex.assert_trees_all_equal_shapes_and_dtypes(dense, tensors)
    layout, x = ("NCHW", "OIHW", "NCHW"), normal(2, 4, 8, 8)
    factors = small["layer1"]["0"]["conv1"]
    between = jax.lax.conv_general_dilated(
        x, factors["vertical"]["weight"], (2, 1), [(1, 1), (0, 0)]
    )
    found = jax.lax.conv_general_dilated(
        between, factors["horizontal"]["weight"], (1, 1), [(0, 0), (2, 2)]
    )
    assert_close(found, conv(x, dense["layer1.0.conv1.weight"], layout, [(1, 1), (2, 2)]))


@pytest.mark.parametrize(
    "axes, shape", [("OIHW", (6, 4, 3, 5)), ("OIW", (6, 4, 3)), ("OIDHW", (6, 2, 2, 3, 2))]
)
@pytest.mark.parametrize("first", ["vertical", "horizontal"])
def test_full_rank_gives_the_kernel_back_in_every_layout(axes, shape, first):
    tree = {"conv": {"weight": normal(*shape)}}
    scheme = Separable(max_rank(shape, 2, axes, first), 2, axes, first)
    options = {"axes": "OIDHW"[:2] + axes[2:], "leaves": ("weight", "bias")}
    small = jax.jit(lambda tree: decompose(tree, {"conv": scheme}, **options))(tree)
    back = reconstruct(small, **options)["conv"]["weight"]
    # Rounding of an SVD and of a product of factors: some dozens of roundings.
    np.testing.assert_allclose(back, tree["conv"]["weight"], atol=1e-5)


def test_kernels_named_as_in_haiku():
    tree = {"net/~/conv2_d": {"w": normal(3, 3, 4, 6), "b": normal(6)}}
    small = decompose(tree, {"net/~/conv2_d": 2}, leaves=("w", "b"))
    assert small["net/~/conv2_d"]["horizontal"]["b"] is tree["net/~/conv2_d"]["b"]
    chex.assert_trees_all_equal_shapes(reconstruct(small, leaves=("w", "b")), tree)


def test_kernels_named_as_in_keras():
    tree = unflatten_dict(
        {"functional/conv2d/kernel": normal(3, 3, 4, 6), "functional/conv2d/bias": normal(6)},
        sep="/",
    )
    small = decompose(tree, {"functional/conv2d": 12})
    back = reconstruct(small)["functional"]["conv2d"]
    np.testing.assert_allclose(
        back["kernel"], tree["functional"]["conv2d"]["kernel"], atol=1e-5
    )  # an SVD's rounding


def test_an_equinox_model_is_traced_decomposed_and_rebuilt():
    keys = jax.random.split(jax.random.key(0), 2)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(4, 8, (3, 5), stride=(2, 1), key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(8, 8, 3, groups=2, key=keys[1]),
        ]
    )
    arrays, static = eqx.partition(model, eqx.is_array)
    uses = trace(lambda arrays, x: eqx.combine(arrays, static)(x), arrays, normal(4, 16, 16))
    assert [(use.path, use.axes, use.strides, use.groups) for use in uses] == [
        ("layers/0", "OIHW", (2, 1), 1),
        ("layers/2", "OIHW", (1, 1), 2),
    ]
    small = decompose(to_dict(arrays), trace=uses, leaves=("weight", "bias"))
    assert small["layers"]["0"]["vertical"]["weight"].shape[1:] == (4, 3, 1)
    back = from_dict(reconstruct(small, axes="OIHW", leaves=("weight", "bias")), like=arrays)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, arrays)
    full = {use.path: use.scheme(max_rank(use.kernel_shape, use.groups, use.axes)) for use in uses}
    whole = decompose(to_dict(arrays), full, uses, leaves=("weight", "bias"))
    whole = from_dict(reconstruct(whole, axes="OIHW", leaves=("weight", "bias")), like=arrays)
    x = normal(4, 16, 16)
    assert_close(eqx.combine(whole, static)(x), model(x))


def test_leaves_that_are_not_those_of_the_pytree_are_refused():
    with pytest.raises(ValueError, match=r"differ at \['b', 'c'\]; call reconstruct first"):
        from_dict({"a": 1, "c": 2}, like={"a": 0, "b": 0})


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


def test_a_flax_model_of_one_scheme_and_its_pytorch_layout_have_the_same_spectrum():
    kernel = normal(3, 5, 4, 6)
    both = (({"kernel": kernel}, "HWIO"), ({"kernel": kernel.transpose(3, 2, 0, 1)}, "OIHW"))
    small = [decompose({"top": tree}, {"top": 2}, axes=axes)["top"] for tree, axes in both]
    np.testing.assert_allclose(  # the same SVD of the same matrix
        small[0]["vertical"]["kernel"].transpose(3, 2, 0, 1),
        small[1]["vertical"]["kernel"],
        atol=1e-6,
    )
