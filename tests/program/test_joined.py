"""Kernels that a program joins along their outputs are read one after the other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_jax as lr
from lowrank_jax.program.jaxprs import programs
from lowrank_jax.program.joined import apart

many = settings(max_examples=5)  # each is compiled

NAMES = "abc"


def normal(shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def kernels(shapes, dtype="float32"):
    pairs = zip(NAMES, shapes, strict=False)
    return {name: {"kernel": normal(shape, i, dtype)} for i, (name, shape) in enumerate(pairs)}


def joined(tree, axis=-1):
    return jnp.concatenate([tree[name]["kernel"] for name in sorted(tree)], axis)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def scanned(tree, x):
    """Inputs (batch, 4), read by a loop as wide as its carry."""
    kernel = joined(tree)

    def step(carry, _):
        return jnp.tanh(carry @ kernel)[:, :4], carry

    return jax.lax.scan(step, x, length=3)


# Each reads kernels (4, outputs), or (3, 3, 4, outputs), that were joined.
READ = {
    "product": lambda tree, x: x @ joined(tree),
    "from the left": lambda tree, x: jnp.einsum("io,bi->ob", joined(tree), x),
    "transposed": lambda tree, x: x @ joined(jax.tree.map(jnp.transpose, tree), 0).T,
    "converted": lambda tree, x: x.astype("bfloat16") @ joined(tree).astype("bfloat16"),
    "in jit": lambda tree, x: jax.jit(lambda tree: x @ joined(tree))(tree),
    "in remat": lambda tree, x: jax.checkpoint(lambda tree: x @ joined(tree))(tree),
    "in scan": scanned,
    "each image": lambda tree, x: jax.vmap(lambda row: row @ joined(tree))(x),
}


def rounding(tree):
    return 0.05 if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(tree)) else 1e-5


@pytest.mark.parametrize("how", READ)
@given(widths=st.lists(st.integers(2, 6), min_size=2, max_size=3))
@many
def test_each_kernel_has_factors_and_the_function_is_that_of_their_products(how, widths):
    widths = [max(width, 4) for width in widths] if how == "in scan" else widths
    tree, x = kernels([(4, width) for width in widths]), normal((5, 4), seed=9)
    found = lr.trace(READ[how], tree, x)
    assert [use.path for use in found] == sorted(tree) and all(use.safe for use in found)
    ranks = {use.path: 1 for use in found}
    small = lr.decompose(tree, ranks, trace=found)
    wanted = READ[how](lr.reconstruct(small), x)
    given = lr.lowrank(READ[how])(small, x)
    scale = max(float(jnp.abs(y).max()) for y in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(given, wanted, atol=rounding(wanted) * max(scale, 1))
    assert lr.trace(lr.lowrank(READ[how]), small, x).macs < found.macs


@given(widths=st.lists(st.integers(4, 8), min_size=2, max_size=3), separable=st.booleans())
@many
def test_joined_kernels_of_a_convolution_have_factors(widths, separable):
    tree, x = kernels([(3, 3, 4, width) for width in widths]), normal((2, 7, 6, 4), seed=9)
    apply = lambda tree, x: convolve(x, joined(tree))  # noqa: E731
    scheme = lr.Separable(2) if separable else lr.Channel(2)
    small = lr.decompose(tree, dict.fromkeys(tree, scheme), trace=lr.trace(apply, tree, x))
    wanted = apply(lr.reconstruct(small), x)
    np.testing.assert_allclose(jax.jit(lr.lowrank(apply))(small, x), wanted, atol=1e-4)


def test_a_call_with_shardings_is_read_alike_each_time():
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    inner = jax.jit(lambda tree, x: x @ joined(tree), in_shardings=(whole, whole))
    tree, x = kernels([(4, 6), (4, 6)]), normal((2, 4))
    traces = [lr.trace(lambda tree, x: inner(tree, x), tree, x) for _ in range(2)]
    assert [[use.safe for use in found] for found in traces] == [[True, True]] * 2
    small = lr.decompose(tree, dict.fromkeys("ab", 2))
    chex.assert_trees_all_close(
        lr.lowrank(inner)(small, x), inner(lr.reconstruct(small), x), rtol=1e-5
    )


def test_the_gradient_is_that_of_the_joined_kernel():
    tree, x = kernels([(4, 3), (4, 5)]), normal((6, 4), seed=9)
    small = lr.decompose(tree, {"a": 2, "b": 2})

    def loss(apply):
        return lambda tree: jnp.sum(jnp.sin(apply(tree, x)))

    found = jax.grad(loss(lr.lowrank(READ["product"])))(small)
    wanted = jax.grad(loss(lambda tree, x: READ["product"](lr.reconstruct(tree), x)))(small)
    chex.assert_trees_all_close(found, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "apply",
    [
        lambda tree, x: jnp.hstack([x, x]) @ joined(tree, 0),  # along the inputs
        lambda tree, x: x @ jnp.hstack([tree["a"]["kernel"], 2 * tree["b"]["kernel"]]),
        lambda tree, x: x @ jnp.hstack([tree["a"]["kernel"], jnp.ones((4, 2))]),
        lambda tree, x: x @ jnp.exp(joined(tree)),
    ],
)
def test_what_is_joined_otherwise_is_multiplied_back(apply):
    tree, x = kernels([(4, 5), (4, 5)]), normal((6, 4), seed=9)
    assert not any(use.safe for use in lr.trace(apply, tree, x))
    small = lr.decompose(tree, {"a": 1, "b": 1})
    wanted = apply(lr.reconstruct(small), x)
    np.testing.assert_allclose(lr.lowrank(apply)(small, x), wanted, rtol=1e-5, atol=1e-5)


def test_a_joined_kernel_that_has_another_use_says_so():
    tree, x = kernels([(4, 5), (4, 5)]), normal((6, 4), seed=9)
    found = lr.trace(lambda tree, x: x @ joined(tree) + jnp.sum(joined(tree) ** 2), tree, x)
    assert all("also used by concatenate" in use.reason for use in found if use.path)


def test_many_kernels_are_told_apart():
    tree = {f"k{i:02}": {"kernel": normal((4, 3), i)} for i in range(20)}
    found = lr.trace(READ["product"], tree, normal((6, 4)))
    assert [use.path for use in found] == sorted(tree) and all(use.safe for use in found)


def test_joined_activations_leave_a_program_as_it_is():
    apply = lambda tree, x: jnp.hstack([x @ tree["a"]["kernel"], x])  # noqa: E731
    program = jax.make_jaxpr(apply)(kernels([(4, 5)]), normal((6, 4)))
    assert apart(program, [True, False], [True, False]) is program


def products(program):
    own = sum(eqn.primitive.name == "dot_general" for eqn in program.eqns)
    return own + sum(products(inner) for eqn in program.eqns for inner in programs(eqn.params))


def test_dense_neighbours_stay_joined():
    tree, x = kernels([(4, 6), (4, 6), (4, 6)]), normal((6, 4), seed=9)
    for path, count in (("a", 3), ("b", 4), ("c", 3)):  # two factors, and what is beside them
        small = lr.decompose(tree, {path: 2})
        found = jax.make_jaxpr(lr.lowrank(READ["product"]))(small, x)
        assert products(found.jaxpr) == count
        wanted = READ["product"](lr.reconstruct(small), x)
        np.testing.assert_allclose(lr.lowrank(READ["product"])(small, x), wanted, atol=1e-5)


def test_the_gates_of_an_lstm_are_compressed_to_a_budget_that_is_exact():
    model, x = nn.RNN(nn.OptimizedLSTMCell(12)), normal((64, 6, 8))
    variables = model.init(jax.random.key(0), x)
    found = lr.calibrate(model.apply, variables, x)
    chosen = lr.plan(found, macs=0.6)
    small = lr.compress(found, chosen)
    macs = lr.trace(lr.lowrank(model.apply), small, x).macs
    assert macs == 64 * chosen.total("macs")[1]
    assert macs <= 0.6 * lr.trace(model.apply, variables, x).macs
    wanted, apply = model.apply(variables, x), lr.lowrank(model.apply)
    error = jnp.linalg.norm(apply(small, x) - wanted)
    assert error < jnp.linalg.norm(apply(lr.decompose(variables, chosen), x) - wanted)
