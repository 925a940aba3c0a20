"""The algorithms of a layer, dense or separable, compute the same, and a network runs by any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.tuning.algorithms import (
    PLAIN,
    Layer,
    algorithms_of,
    dense_step,
    factor_shapes,
    padded,
    steps,
)
from lowrank_jax.tuning.running import with_algorithms
from lowrank_jax.tuning.steps import STEPS

# Sums of up to 5 * 7 products of order one, in another order: a few units in the last place of the
# type.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def layer(
    size=(3, 3),
    strides=(1, 1),
    padding=((1, 1), (1, 1)),
    dilation=(1, 1),
    groups=1,
    dtype="float32",
):
    return Layer((2, 9, 8, 4), 6, size, strides, padding, dilation, (1,) * len(size), groups, dtype)


def arrays(own: Layer, rank: int, first: str):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal(shape), own.dtype)
        for shape in (own.inputs, *factor_shapes(own, rank, first))
    ]


def gap(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(a).max())


@pytest.mark.slow
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
    st.sampled_from(["vertical", "horizontal", "spatial", "pointwise"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
)
@settings(max_examples=3)
def test_every_algorithm_computes_the_two_convolutions(
    size, strides, dilation, padding, first, dtype, compiled
):
    if any(
        n + sum(p) < (k - 1) * d + 1
        for n, p, k, d in zip((9, 8), padding, size, dilation, strict=True)
    ):
        return  # no output at all
    own = layer(size, strides, padding, dilation, dtype=dtype)
    x, one, two = arrays(own, 3, first)
    wanted = own.run(PLAIN, first, x, one, two)
    for name in algorithms_of(own, 3):
        run = lambda x, one, two, name=name: own.run(name, first, x, one, two)  # noqa: E731
        found = (jax.jit(run) if compiled else run)(x, one, two)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
        assert gap(wanted, found) <= TOLERANCE[dtype], name
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal(own.kernel), dtype)
    for name in algorithms_of(own, None):
        run = lambda x, kernel, name=name: own.convolve(x, kernel, dense_step(name))  # noqa: E731
        found = (jax.jit(run) if compiled else run)(x, kernel)
        assert found.dtype == dtype and gap(own.convolve(x, kernel), found) <= TOLERANCE[dtype], (
            name
        )


@pytest.mark.parametrize("name", ["kn2row", "im2col"])
@pytest.mark.parametrize(
    "own",
    [layer(groups=2), Layer((1, 5, 5, 4), 6, (3, 1), (1, 1), ((1, 1), (0, 0)), (1, 1), (2, 1))],
)
def test_steps_that_cannot_slice_are_the_convolution(name, own):
    kernel = jnp.ones(own.kernel)
    np.testing.assert_array_equal(
        own.convolve(jnp.ones(own.inputs), kernel, STEPS[name]),
        own.convolve(jnp.ones(own.inputs), kernel),
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_steps_take_padding_by_name(padding):
    own = layer(size=(1, 4), strides=(1, 2), dilation=(1, 2))
    x, kernel = jax.random.normal(jax.random.key(0), own.inputs), jnp.ones(own.kernel)
    wanted = own.convolve(x, kernel, padding=padding)
    for step in (STEPS["kn2row"], STEPS["im2col"]):
        assert gap(wanted, own.convolve(x, kernel, step, padding=padding)) < 1e-5


def test_a_kernel_with_taps_along_both_axes_can_be_unfolded_but_not_shifted():
    own, x = layer(size=(3, 2), strides=(2, 1), padding=((2, 0), (0, 1))), jnp.ones((2, 9, 8, 4))
    kernel = jax.random.normal(jax.random.key(0), own.kernel)
    np.testing.assert_array_equal(own.convolve(x, kernel), own.convolve(x, kernel, STEPS["kn2row"]))
    assert gap(own.convolve(x, kernel), own.convolve(x, kernel, STEPS["im2col"])) < 1e-5


def test_layers_with_groups_or_dilated_inputs_have_no_other_steps():
    for own in (layer(groups=2), Layer((1, 8, 4), 6, (3,), (1,), ((1, 1),), (1,), (1,))):
        assert algorithms_of(own, 2) == [PLAIN, "merged"] and algorithms_of(own, None) == [
            "convolve"
        ]


def test_padding_the_rank_changes_nothing_and_is_offered_only_where_it_pads():
    own = layer()
    x, one, two = arrays(own, 3, "vertical")
    assert padded(one, two)[0].shape[-1] == 8
    assert "padded" in algorithms_of(own, 3) and "padded" not in algorithms_of(own, 8)
    assert (
        gap(own.run(PLAIN, "vertical", x, one, two), own.run("padded", "vertical", x, one, two))
        < 1e-6
    )


@pytest.mark.parametrize("name", ["fast", "convolve", "convolve+guess", "merged", None, 3])
def test_unknown_algorithms_are_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=r"convolve, kn2row, im2col"):
        steps(name)
    if name != "convolve":
        with pytest.raises(ValueError, match=r"dense layer; give one of convolve, kn2row, im2col"):
            dense_step(name)


def test_a_layer_is_read_from_a_trace_in_any_layout():
    model, x = nn.Conv(6, (3, 5), strides=2, padding=1), jnp.ones((2, 9, 8, 4))
    variables = model.init(jax.random.key(0), x)
    own = Layer.of(lr.trace(model.apply, variables, x)[0])
    assert own == Layer((2, 9, 8, 4), 6, (3, 5), (2, 2), ((1, 1), (1, 1)), (1, 1), (1, 1))
    found = own.convolve(x, variables["params"]["kernel"])
    np.testing.assert_allclose(found, model.apply(variables, x), atol=1e-6)


def test_a_product_is_no_layer():
    model, x = nn.Dense(3), jnp.ones((2, 4))
    with pytest.raises(ValueError, match="no convolution"):
        Layer.of(lr.trace(model.apply, model.init(jax.random.key(0), x), x)[0])


class Two(nn.Module):
    """Layers whose arguments take every form."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, padding=[(0, 1), (2, 1)])(x))
        x = nn.relu(nn.Conv(8, (3, 3), padding="CIRCULAR")(x))
        return nn.Conv(6, (3, 3), kernel_dilation=2, dtype=jnp.float32)(x)


@pytest.mark.parametrize(
    "name", ["kn2row+im2col", "im2col+kn2row", "padded", "merged", "merged winograd"]
)
def test_lowrank_runs_the_algorithm_that_is_chosen(name):
    model, x = Two(), jax.random.normal(jax.random.key(1), (2, 9, 9, 4))
    variables = model.init(jax.random.key(0), x)
    small = {"params": lr.decompose(variables["params"], {f"Conv_{i}": 3 for i in range(3)})}
    asked = []

    def choose(own, scheme):
        asked.append((own.inputs, own.padding, scheme.rank))
        return name

    found = jax.jit(with_algorithms(model.apply, choose))(small, x)
    assert gap(lr.lowrank(model.apply)(small, x), found) < 1e-5
    around = ((2, 6, 7, 8), ((0, 0), (0, 0)), 3)  # Flax pads by itself
    last = ((2, 4, 5, 8), ((2, 2), (2, 2)), 3)
    assert asked == [((2, 9, 9, 4), ((0, 1), (2, 1)), 3), around, last]


def test_a_kernel_may_stand_on_either_side_of_a_product():
    tree = {"w": jax.random.normal(jax.random.key(0), (8, 12))}
    x = jax.random.normal(jax.random.key(1), (5, 12))

    def apply(tree, x):
        return (tree["w"] @ x.T).T

    small = lr.decompose(tree, {"w": 3}, lr.trace(apply, tree, x))
    found = jax.jit(with_algorithms(apply, lambda own, scheme: "im2col"))(small, x)
    assert gap(lr.lowrank(apply)(small, x), found) < 1e-5


def test_the_algorithm_of_a_layer_is_the_one_in_the_compiled_text():
    # In half precision a product is no 1 x 1 convolution, so that what is left can be counted.
    model, x = nn.Sequential([nn.Conv(8, (3, 3), dtype=jnp.bfloat16)]), jnp.ones((1, 8, 8, 4))
    dense = model.init(jax.random.key(0), x)
    small = {"params": lr.decompose(dense["params"], {"layers_0": 2})}

    def convolutions(name: str, tree=small) -> int:
        return str(jax.make_jaxpr(with_algorithms(model.apply, lambda *_: name))(tree, x)).count(
            "conv_g"
        )

    counts = {
        name: convolutions(name) for name in (PLAIN, "kn2row+convolve", "im2col+kn2row", "merged")
    }
    assert counts == {PLAIN: 2, "kn2row+convolve": 1, "im2col+kn2row": 0, "merged": 1}
    assert convolutions("convolve", dense) == 1 and convolutions("im2col", dense) == 0


def test_products_in_float32_are_convolutions_that_xla_makes_products_of():
    own = layer(size=(1, 1), padding=((0, 0), (0, 0)))
    x, kernel = jnp.ones(own.inputs), jnp.ones(own.kernel)
    compiled = (
        jax.jit(lambda x, k: own.convolve(x, k, STEPS["im2col"]))
        .lower(x, kernel)
        .compile()
        .as_text()
    )
    if jax.default_backend() == "cpu":
        assert " convolution(" not in compiled


class Mixed(nn.Module):
    """A layer that is decomposed, dense ones of every kind, and one with a function of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False)(x)
        x = nn.Conv(8, (3, 3), padding="CIRCULAR")(x)
        x = nn.Conv(8, (1, 3), strides=(1, 2), mask=jnp.ones((1, 3, 8, 8)))(x)
        x = nn.Conv(8, (3, 3), conv_general_dilated=jax.lax.conv_general_dilated)(x)
        x = nn.ConvTranspose(8, (3, 3))(x)
        return nn.Conv(4, (3, 3))(x[0])


@pytest.mark.slow
def test_dense_layers_are_asked_for_their_algorithm_and_factors_are_not_asked_again():
    model, x = Mixed(), jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    variables = model.init(jax.random.key(0), x)
    small = {"params": lr.decompose(variables["params"], {"Conv_0": 3})}
    asked = []

    def choose(own, scheme):
        asked.append((own.size, own.groups, own.inputs[0], scheme and scheme.rank))
        return "im2col" if scheme is None else "merged"

    run = with_algorithms(model.apply, choose)
    found = run(small, x)
    assert gap(lr.lowrank(model.apply)(small, x), found) < 1e-5
    grouped, plain, last = ((3, 3), 2, 2), ((3, 3), 1, 2), ((3, 3), 1, 1)
    dense = [(*own, None) for own in (grouped, plain, plain, plain, last)]  # a mask computes one
    assert asked == [((3, 3), 1, 2, 3), *dense]
    assert (
        gap(found, jax.jit(run)(small, x)) < 1e-5
        and gap(model.apply(variables, x), run(variables, x)) < 1e-5
    )


@pytest.mark.slow
def test_gradients_pass_through_every_algorithm():
    own = layer()
    x, one, two = arrays(own, 3, "vertical")

    def loss(pair, name):
        return jnp.sum(own.run(name, "vertical", x, *pair) ** 2)

    wanted = jax.grad(loss)((one, two), PLAIN)
    for name in algorithms_of(own, 3):
        found = jax.grad(loss)((one, two), name)
        assert all(gap(*pair) < 1e-4 for pair in zip(wanted, found, strict=True)), name
    kernel = jnp.ones(own.kernel)
    whole = [
        jax.grad(lambda k, n=n: jnp.sum(own.convolve(x, k, STEPS[n]) ** 2))(kernel)
        for n in ("convolve", "im2col")
    ]
    assert gap(*whole) < 1e-4
