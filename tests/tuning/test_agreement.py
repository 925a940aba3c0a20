"""Whether outputs are the same, and which ones are trusted."""

import jax
import jax.numpy as jnp
import pytest

from lowrank_jax.tuning.agreement import agree, agreeing, most_agreed, rounding

X, BROKEN = jnp.arange(3.0), jnp.full(3, jnp.nan)


def test_the_outputs_of_most_are_trusted_and_of_equals_the_first():
    near = X * (1 + 1e-7)
    assert most_agreed({"broken": BROKEN, "far": X + 1, "a": X, "b": near}, 1e-5) == "a"
    assert most_agreed({"default": X, "other": X + 1}, 1e-5) == "default"
    assert most_agreed({"default": BROKEN, "other": BROKEN}, 1e-5) == "default"


def test_those_that_agree_with_most_others_are_named_and_the_most_agreed_is_first():
    outputs = {"far": X + 1, "a": X, "broken": BROKEN, "b": X, "c": X + 1, "d": X + 1}
    assert agreeing(outputs, 1e-5) == ["far", "c", "d"]
    assert agreeing({"broken": BROKEN}, 1e-5) == ["broken"]


def test_outputs_agree_by_shape_type_and_value():
    x = {"a": jnp.arange(3.0), "b": jnp.zeros(2)}
    assert agree(x, jax.tree.map(lambda y: y * (1 + 1e-6), x), 1e-5)
    assert not agree(x, jax.tree.map(lambda y: y * 1.01, x), 1e-3)
    assert not agree(x, jax.tree.map(lambda y: y.astype("bfloat16"), x), 1.0)
    assert not agree(x, jax.tree.map(lambda y: y[:1], x), 1.0)
    assert not agree(x, jax.tree.map(lambda y: y + jnp.nan, x), 1.0)


@pytest.mark.parametrize(("dtype", "eps"), [("float32", 2**-23), ("bfloat16", 2**-7)])
def test_rounding_is_that_of_the_coarsest_type(dtype, eps):
    program = jax.make_jaxpr(lambda x: (x.astype(dtype) * 2).astype("float32"))(X)
    assert rounding(program) == eps**0.5
