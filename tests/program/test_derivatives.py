"""Whatever JAX says of a function without a derivative is told; other errors go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from lowrank_jax.program.derivatives import NO_DERIVATIVE, what_is_lacking

lonely = Primitive("lonely")
lonely.def_impl(lambda x: x)
lonely.def_abstract_eval(lambda x: x)


def loop(x):
    return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: 2 * y, x).sum()


def callback(x):
    return jax.pure_callback(np.sin, x, x).sum()


def unknown(x):
    return lonely.bind(x).sum()


@pytest.mark.parametrize("function", [loop, callback, unknown])
def test_a_function_without_a_derivative_is_told(function):
    with pytest.raises(NO_DERIVATIVE) as caught:
        jax.grad(function)(jnp.ones(3))
    assert what_is_lacking(caught.value) in str(caught.value)


@pytest.mark.parametrize("kind", NO_DERIVATIVE)
def test_another_error_goes_on(kind):
    error = kind("Incompatible shapes for dot: got (2, 3) and (2, 3).")
    with pytest.raises(kind, match="Incompatible shapes") as caught:
        what_is_lacking(error)
    assert caught.value is error
