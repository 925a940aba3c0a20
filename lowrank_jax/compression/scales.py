"""The values that a program puts on the channels of a layer, and that no input changes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from lowrank_jax.program.channels import Channels
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.interpreter import bind
from lowrank_jax.program.jaxprs import constants, opened


def along(value: Any, axis: int) -> np.ndarray:
    """The entries of an array along the one axis on which they differ."""
    wide = np.asarray(value, np.float64)
    if axis < 0:
        return wide.ravel()[0]
    return np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1)[:, 0]


def evaluate(flat: Any, channels: Channels, wanted: Sequence[Any], values: Sequence) -> list:
    """The values of variables that do not depend on the images.

    Args:
        flat: the program.
        channels: tells which variables these are.
        wanted: variables or literals.
        values: of the program's inputs.
    """
    jaxpr = opened(flat)

    def run(inputs: Sequence[jax.Array]) -> list:
        variables = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(variables, [*constants(flat), *inputs], strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else known[var]

        for eqn in jaxpr.eqns:
            if all(var in channels.fixed for var in eqn.outvars):
                found = bind(eqn, [read(var) for var in eqn.invars])
                known.update(zip(eqn.outvars, found, strict=True))
        return [jnp.asarray(read(var)) for var in wanted]

    return jax.jit(run, compiler_options=default_options())(values)
