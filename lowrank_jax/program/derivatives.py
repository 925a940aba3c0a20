"""Where a function has no derivative, and what JAX raises there."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from lowrank_jax.program.interpreter import bind

# A primitive without a rule is a NotImplementedError, a while loop or a callback a ValueError.
NO_DERIVATIVE = (NotImplementedError, ValueError)
_WORDS = "differentiation", "jvp"


def what_is_lacking(error: Exception) -> str:
    """The first line of an error that says that a derivative is lacking.

    Raises:
        Exception: the error given, if it says something else.

    Example:
        >>> what_is_lacking(ValueError("Pure callbacks do not support JVP."))
        'Pure callbacks do not support JVP.'
    """
    text = str(error)
    if not any(word in text.lower() for word in _WORDS):
        raise error
    return text.splitlines()[0]


def lacks_derivative(eqn: Any) -> bool:
    """Whether an equation gives floating-point numbers that have no derivative, as a while loop."""
    fixed = [var.val if isinstance(var, Literal) else None for var in eqn.invars]
    shapes = {i: var.aval for i, var in enumerate(eqn.invars) if fixed[i] is None}
    floats = [i for i, aval in shapes.items() if jnp.issubdtype(aval.dtype, jnp.floating)]

    def total(own: dict[int, Any], others: dict[int, Any]) -> Any:
        values = {**own, **others}
        found = bind(eqn, [values.get(i, value) for i, value in enumerate(fixed)])
        return sum(jnp.sum(y) for y in found if jnp.issubdtype(y.dtype, jnp.floating)) + 0.0

    own = {i: shapes.pop(i) for i in floats}
    try:
        jax.eval_shape(jax.grad(total), own, shapes)
    except NO_DERIVATIVE as error:
        return bool(what_is_lacking(error))
    return False
