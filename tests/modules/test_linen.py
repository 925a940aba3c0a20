"""SeparableConv is nn.Conv with factors: the tree of decompose, at full rank the same output."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowrank_jax import Separable, SeparableConv, decompose, lowrank, max_rank, reconstruct
from lowrank_jax.factorization.factors import factor_keys


def normal(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def assert_same_as_conv(inputs=None, features=8, kernel_size=(3, 3), transform=jax.jit, **options):
    """Compares with nn.Conv of the same arguments: tree, types, output."""
    x = normal((2, 9, 7, 4)) if inputs is None else inputs
    groups = options.get("feature_group_count", 1)
    dense = nn.Conv(features, kernel_size, **options)
    skeleton = jax.eval_shape(dense.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: normal(leaf.shape, leaf.dtype) / 4, skeleton)
    rank = max_rank(variables["params"]["kernel"].shape, groups)
    separable = SeparableConv(features, kernel_size, rank, **options)
    small = decompose(variables, {"kernel": Separable(rank, groups)})
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(separable.init, jax.random.key(0), x), small
    )
    both = transform(
        lambda variables, small, x: (dense.apply(variables, x), separable.apply(small, x))
    )
    expected, found = both(variables, small, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    # Sums of tens of terms, both factors and the channels between them rounded to the type of the
    # computation
    # or of the storage, whichever is coarser: a few tens of roundings of the largest value.
    eps = max(
        float(jnp.finfo(array.dtype).eps) for array in (expected, variables["params"]["kernel"])
    )
    scale = np.abs(np.asarray(expected, np.float64)).max()
    assert scale > 0.1
    np.testing.assert_allclose(np.float64(found), np.float64(expected), atol=20 * eps * scale)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.checkpoint])
def test_same_as_conv_compiled_or_not(transform):
    assert_same_as_conv(transform=transform)


@pytest.mark.parametrize(
    "kernel_size", [(3, 3), (3, 5), (1, 4), (4, 1), (2, 2), (1, 1), [3, 3], (np.int64(3), 3)]
)
def test_same_as_conv_for_every_kernel_size(kernel_size):
    assert_same_as_conv(kernel_size=kernel_size)


PADDINGS = [
    "SAME",
    "SAME_LOWER",
    "VALID",
    "CIRCULAR",
    "REFLECT",
    0,
    2,
    [1, 2],
    [(1, 2), (0, 3)],
    ((2, 0), 1),
]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_same_as_conv_for_every_padding(padding):
    assert_same_as_conv(padding=padding, strides=(2, 1), kernel_size=(2, 4))


@pytest.mark.parametrize("strides", [None, 1, 2, (2, 1), [1, 3]], ids=str)
@pytest.mark.parametrize("padding", ["SAME", [(1, 2), (0, 3)]], ids=str)
def test_same_as_conv_for_every_stride(padding, strides):
    assert_same_as_conv(padding=padding, strides=strides)


@pytest.mark.parametrize(
    "padding", ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", [(1, 2), (0, 3)]], ids=str
)
def test_same_as_conv_for_kernel_dilation(padding):
    assert_same_as_conv(padding=padding, kernel_dilation=(2, 3), strides=(2, 1))


@pytest.mark.parametrize(
    "kernel_dilation, input_dilation", [(2, None), (None, 2), (1, (3, 1)), (2, (1, 2))]
)
def test_same_as_conv_for_input_dilation(kernel_dilation, input_dilation):
    options = {"kernel_dilation": kernel_dilation, "input_dilation": input_dilation}
    assert_same_as_conv(padding=[(1, 2), (0, 3)], strides=(2, 1), **options)


@pytest.mark.parametrize(
    "layer", [nn.Conv(8, (3, 3), input_dilation=2), SeparableConv(8, (3, 3), 2, input_dilation=2)]
)
def test_input_dilation_needs_padding_in_numbers_as_in_conv(layer):
    with pytest.raises(ValueError, match="exactly specify the required padding"):
        layer.init(jax.random.key(0), normal((1, 5, 5, 4)))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel_size, use_bias", [((3, 3), True), ((3, 5), False), ((4, 1), True)])
def test_same_as_conv_for_every_number_of_groups(groups, kernel_size, use_bias):
    assert_same_as_conv(
        kernel_size=kernel_size, feature_group_count=groups, use_bias=use_bias, strides=2
    )


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "param_dtype, input_dtype", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16",) * 2]
)
def test_same_as_conv_for_every_type(dtype, param_dtype, input_dtype):
    assert_same_as_conv(
        normal((2, 9, 7, 4), input_dtype), dtype=dtype, param_dtype=jnp.dtype(param_dtype)
    )


@pytest.mark.parametrize(
    "batch, padding", [((), "SAME"), ((3,), "CIRCULAR"), ((2, 3), "CIRCULAR"), ((2, 3), "SAME")]
)
def test_same_as_conv_for_every_number_of_batch_dimensions(batch, padding):
    assert_same_as_conv(normal((*batch, 6, 5, 4)), padding=padding)


def test_same_as_conv_with_a_promotion_of_ones_own():
    def to_bfloat16(*arrays, dtype=None, inexact=True):
        return nn.dtypes.promote_dtype(*arrays, dtype=jnp.bfloat16, inexact=inexact)

    assert_same_as_conv(promote_dtype=to_bfloat16)
    layer = SeparableConv(4, (3, 3), 2, promote_dtype=to_bfloat16)
    output, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), normal((5, 5, 2)))
    assert output.dtype == jnp.bfloat16


def eqns(function, *arguments):
    """The convolutions of the traced program."""
    return [
        eqn
        for eqn in jax.make_jaxpr(function)(*arguments).eqns
        if eqn.primitive.name == "conv_general_dilated"
    ]


@pytest.mark.parametrize("precision", [None, "highest"])
def test_the_precision_reaches_both_convolutions(precision):
    assert_same_as_conv(precision=precision)
    x = normal((1, 6, 6, 4))
    layer = SeparableConv(8, (3, 3), 2, precision=precision)
    dense = nn.Conv(8, (3, 3), precision=precision)
    wanted = eqns(dense.apply, dense.init(jax.random.key(0), x), x)[0].params["precision"]
    found = eqns(layer.apply, layer.init(jax.random.key(0), x), x)
    assert [eqn.params["precision"] for eqn in found] == [wanted] * 2


def test_the_vertical_convolution_carries_the_vertical_options_and_the_horizontal_one_the_horizontal():  # noqa: E501
    x = normal((1, 9, 9, 4))
    layer = SeparableConv(
        8, (3, 5), 2, strides=(2, 3), kernel_dilation=(1, 2), padding=[(1, 0), (2, 3)]
    )
    vertical, horizontal = eqns(layer.apply, layer.init(jax.random.key(0), x), x)
    assert vertical.params["window_strides"] == (2, 1) and horizontal.params["window_strides"] == (
        1,
        3,
    )
    assert vertical.params["rhs_dilation"] == (1, 1) and horizontal.params["rhs_dilation"] == (1, 2)
    assert vertical.params["padding"] == ((1, 0), (0, 0)) and horizontal.params["padding"] == (
        (0, 0),
        (2, 3),
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_below_full_rank_it_computes_the_convolution_with_the_reconstructed_kernel(groups):
    x = normal((2, 6, 6, 4))
    layer = SeparableConv(8, (3, 3), rank=2, feature_group_count=groups, strides=(1, 2))
    variables = layer.init(jax.random.key(0), x)
    dense = nn.Conv(8, (3, 3), feature_group_count=groups, strides=(1, 2))
    # Float32 sums of about 40 terms of the order of 1, in another order.
    np.testing.assert_allclose(
        layer.apply(variables, x), dense.apply(reconstruct(variables), x), atol=1e-5
    )


@pytest.mark.parametrize("first", ["vertical", "horizontal"])
def test_each_factor_has_its_initialiser(first):
    ones, twos, threes = (nn.initializers.constant(value) for value in (1.0, 2.0, 3.0))
    layer = SeparableConv(
        8, (3, 3), 2, kernel_init=ones, first_init=twos, bias_init=threes, first=first
    )
    params = layer.init(jax.random.key(0), normal((5, 5, 4)))["params"]
    one, two = factor_keys(first, "HWIO", 4)
    assert jnp.all(params["kernel"][one] == 2) and jnp.all(params["kernel"][two] == 1)
    assert jnp.all(params["bias"] == 3)


class Deep(nn.Module):
    """20 separable convolutions, each followed by a function."""

    rank: int
    groups: int
    kernel_init: nn.initializers.Initializer
    follow: Callable

    @nn.compact
    def __call__(self, x):
        sizes, options = ((64, (3, 3), self.rank), {"feature_group_count": self.groups})
        for _ in range(20):
            # Around the edges, since zeros there would take variance away.
            layer = SeparableConv(
                *sizes, kernel_init=self.kernel_init, padding="CIRCULAR", **options
            )
            x = self.follow(layer(x))
        return x


@pytest.mark.parametrize("rank, groups", [(16, 1), (64, 1), (150, 1), (16, 4)])
@pytest.mark.parametrize(
    "init, follow", [(nn.initializers.lecun_normal(), lambda x: x),
                     (nn.initializers.he_normal(), nn.relu)], ids=["linear", "ReLU"]
)  # fmt: skip
def test_activations_keep_their_scale_through_twenty_layers(init, follow, rank, groups):
    x, model = normal((2, 8, 8, 64)), Deep(rank, groups, init, follow)
    keys = jax.vmap(jax.random.key)(jnp.arange(4))
    outputs = jax.vmap(lambda key: model.init_with_output(key, x)[0])(keys)
    # A layer whose factors both had the gain for a ReLU would double the mean square: 1e6 in all.
    # That of one random layer differs from its expectation by a tenth or two, and the logarithm is
    # smaller on average where it does.
    ratios = [float(jnp.mean(y**2) / jnp.mean(x**2)) for y in outputs]
    assert 0.1 < np.exp(np.mean(np.log(ratios))) < 10


def refuse(*arguments, channels=4, **options):
    with pytest.raises(ValueError) as info:
        SeparableConv(*arguments, **options).init(jax.random.key(0), normal((1, 8, 8, channels)))
    return str(info.value)


@pytest.mark.parametrize("kernel_size", [3, (), (3, 3, 3, 3), (3, 2.5), None])
def test_a_kernel_size_that_is_not_one_to_three_ints_is_refused(kernel_size):
    message = refuse(8, kernel_size, 2)
    assert "kernel_size=" in message and "one to three ints" in message


@pytest.mark.parametrize("padding", ["CAUSAL"])
def test_padding_that_two_dimensions_do_not_have_is_refused(padding):
    assert "padding" in refuse(8, (3, 3), 2, padding=padding).lower()


@pytest.mark.parametrize("rank", [0, -1, 13, True, 2.5, "3", None])
def test_a_rank_out_of_range_is_refused(rank):
    message = refuse(8, (3, 3), rank)
    assert f"rank {rank!r}" in message and "from 1 to 12" in message


def test_the_refusal_of_a_rank_names_the_layer_and_its_groups():
    message = refuse(8, (3, 3), 7, name="stem", feature_group_count=2)
    assert message.startswith("stem: ") and "from 1 to 6" in message and "2 group(s)" in message


def test_a_network_with_the_layer_runs_by_lowrank_as_it_does_alone():
    model, x = nn.Sequential([SeparableConv(8, (3, 3), rank=2), nn.relu]), jnp.ones((2, 8, 8, 3))
    variables = model.init(jax.random.key(0), x)
    found = jax.jit(lowrank(model.apply))(variables, x)
    np.testing.assert_allclose(found, jax.jit(model.apply)(variables, x), rtol=1e-6)
