"""Scales after convolutions in the kernels: the same numbers, fewer operations on the outputs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.models import CifarResNet
from lowrank_jax.program.compiler import calls_onednn, candidate_options
from lowrank_jax.program.jaxprs import opened, programs
from lowrank_jax.tuning.experimental.folding import folded
from lowrank_jax.tuning.search import fast

pytestmark = pytest.mark.slow

# Float32: the kernel is rounded once more, and the sums of up to 100 products are those of other
# numbers.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
LAYOUTS = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NCHW")


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def convolve(x, kernel, layout=LAYOUTS[0], **options):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, **options
    )


def products(fn, *args):
    """Shapes of all products of elements in the program of a function, nested ones included."""

    def of(program):
        for eqn in opened(program).eqns:
            if eqn.primitive.name == "mul":
                yield eqn.outvars[0].aval.shape
            for inner in programs(eqn.params):
                yield from of(inner)

    return list(of(jax.make_jaxpr(fn)(*args)))


def scaled_outputs(fn, *args):
    """How often a function multiplies arrays of the ten images."""
    return sum(shape[:1] == (10,) for shape in products(fn, *args))


X, KERNEL, SCALE = random(0, 10, 8, 8, 4), random(1, 3, 3, 4, 6), random(2, 6)


@settings(max_examples=15)
@given(
    st.sampled_from(LAYOUTS),
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from("+-*s"), min_size=1, max_size=5),
)
def test_any_maps_of_channels_after_a_convolution_give_the_same(layout, groups, maps):
    order = [layout[1].index(letter) for letter in "HWIO"]
    kernel = jnp.transpose(random(1, 3, 3, 4 // groups, 6), np.argsort(order))
    x = jnp.transpose(X, ["NHWC".index(letter) for letter in layout[0]])
    shape = [6 if letter == "C" else 1 for letter in layout[2]]

    def fn(x, kernel):
        y = convolve(x, kernel, layout, feature_group_count=groups)
        for seed, how in enumerate(maps):
            by = 0.5 if how == "s" else random(seed, *shape)
            y = {"+": jnp.add, "-": jnp.subtract, "*": jnp.multiply, "s": jnp.multiply}[how](y, by)
        return jnp.tanh(y)

    assert scaled_outputs(folded(fn), x, kernel) == 0
    for run in (folded(fn), jax.jit(folded(fn))):
        np.testing.assert_allclose(run(x, kernel), fn(x, kernel), **ROUNDING)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda x, k: (y := convolve(x, k)) + y * SCALE, id="read twice"),
        pytest.param(lambda x, k: ((y := convolve(x, k)) * SCALE, y), id="also an output"),
        pytest.param(lambda x, k: SCALE - convolve(x, k), id="subtracted from"),
        pytest.param(lambda x, k: jnp.square(convolve(x, k)), id="by itself"),
        pytest.param(lambda x, k: convolve(x, k) * random(3, 8, 1), id="by place"),
        pytest.param(lambda x, k: convolve(x, k) * random(3, 10, 1, 1, 1), id="by image"),
        pytest.param(lambda x, k: convolve(x, k) + SCALE, id="a bias alone"),
        pytest.param(
            lambda x, k: convolve(x[:5, :2, :2], k) * SCALE,
            id="a kernel of more numbers than outputs",
        ),
        pytest.param(
            lambda x, k: convolve(x.astype("bfloat16"), k.astype("bfloat16")) * SCALE,
            id="another type",
        ),
        pytest.param(
            lambda x, k: jax.lax.map(lambda x: convolve(x[None], k) * SCALE, x), id="in a loop"
        ),
        pytest.param(lambda x, k: convolve(x[:0], k) * SCALE, id="no images"),
    ],
)
def test_what_is_no_scale_of_channels_or_not_worth_it_stays_as_it_is(fn):
    chex.assert_trees_all_equal(jax.jit(folded(fn))(X, KERNEL), jax.jit(fn)(X, KERNEL))
    assert str(jax.make_jaxpr(folded(fn))(X, KERNEL)) == str(jax.make_jaxpr(fn)(X, KERNEL))


def test_scales_of_zero_give_zero_and_others_than_numbers_no_numbers():
    scale = jnp.asarray([0.0, jnp.inf, -jnp.inf, jnp.nan, 1.0, 1e-30])
    fn = lambda x, kernel: convolve(x, kernel) * scale  # noqa: E731
    one, two = (np.asarray(run(X, KERNEL)) for run in (folded(fn), fn))
    # The order decides what is infinite and what is no number: infinity times a zero of the padding
    # is none.
    np.testing.assert_array_equal(np.isfinite(one), np.isfinite(two))
    np.testing.assert_allclose(
        *(np.nan_to_num(y, posinf=0, neginf=0) for y in (one, two)), **ROUNDING
    )


def test_a_nested_jit_is_folded_and_gradients_are_the_same():
    inner = jax.jit(lambda x, kernel: jax.jit(lambda y: y + 1)(convolve(x, kernel) * SCALE))
    fn = lambda x, kernel: jnp.sin(inner(x, kernel)).sum()  # noqa: E731
    assert scaled_outputs(fn, X, KERNEL) == 1 and scaled_outputs(folded(fn), X, KERNEL) == 0
    for one, two in zip(
        *(jax.grad(run, (0, 1))(X, KERNEL) for run in (folded(fn), fn)), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def noisy(tree):
    """Statistics and weights of batch normalisations that are not those of a new network; variances
    stay positive."""
    leaves, shape = jax.tree.flatten(tree)
    noise = (
        jax.random.uniform(jax.random.key(i), leaf.shape, minval=0.5, maxval=1.5)
        for i, leaf in enumerate(leaves)
    )
    return jax.tree.unflatten(
        shape, [leaf * one + 0.1 * one for leaf, one in zip(leaves, noise, strict=True)]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_low_rank_residual_network_gives_the_same(dtype):
    model, x = CifarResNet(depth=8, dtype=dtype), random(0, 10, 32, 32, 3)
    dense = noisy(model.init(jax.random.key(0), x))
    uses = lr.trace(model.apply, dense, x)
    small = {
        **dense,
        "params": lr.decompose(dense["params"], {use.path: 4 for use in uses if use.axes}, uses),
    }
    apply = lr.lowrank(model.apply)
    if dtype == "float32":
        for variables in (dense, small):
            assert (
                scaled_outputs(folded(apply), variables, x)
                == 0
                < scaled_outputs(apply, variables, x)
            )
    one, two = (jax.jit(run)(small, x) for run in (folded(apply), apply))
    np.testing.assert_allclose(
        one, two, rtol=1e-3, atol=1e-3
    )  # eight layers of rounding in float32


def test_batch_statistics_of_training_stay_as_they_are():
    model = nn.Sequential([nn.Conv(6, (3, 3)), nn.BatchNorm(use_running_average=False)])
    run = lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
    variables = model.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(jax.jit(folded(run))(variables, X), jax.jit(run)(variables, X))


def test_an_nnx_network_gives_the_same():
    norm = nnx.BatchNorm(6, use_running_average=True, rngs=nnx.Rngs(1))
    graph, state = nnx.split(nnx.Sequential(nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0)), norm))
    state = noisy(state)
    fn = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    assert scaled_outputs(folded(fn), state, X) == 0 < scaled_outputs(fn, state, X)
    np.testing.assert_allclose(folded(fn)(state, X), fn(state, X), **ROUNDING)


def test_with_onednn_a_normalised_convolution_is_one_call():
    if not any(map(calls_onednn, candidate_options())):
        pytest.skip("this jaxlib does not call oneDNN's convolutions")
    model = nn.Sequential(
        [nn.Conv(32, (3, 3), use_bias=False), nn.BatchNorm(use_running_average=True), nn.relu]
    )
    x = random(0, 8, 32, 32, 32)
    variables = noisy(model.init(jax.random.key(0), x))
    found = fast(model.apply, variables, x, rounds=2)
    assert any("onednn" in name for name in found.seconds)  # its outputs are those of most
    options = next(filter(calls_onednn, candidate_options()))
    text = (
        jax.jit(folded(model.apply), compiler_options=options)
        .lower(variables, x)
        .compile()
        .as_text()
    )
    assert '"ops":["BIAS","RELU"]' in text
