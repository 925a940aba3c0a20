"""In which order a forward pass uses its parameters, and which of them meet flattened features;
from its jaxpr."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from lowrank_jax.program.jaxprs import programs, traced

UNALTERED = ("convert_element_type", "copy")


@dataclasses.dataclass
class CallOrder:
    """What `call_order` found; leaves are numbered in the order in which JAX flattens the
    variables.

    Attributes:
        position: leaf to the place of its first use among those of all leaves; a leaf never used is
            missing.
        flattened: kernel of a dense layer to the shape (*spatial, channels) of the features that
            were flattened into the layer's inputs, where they were.
        transposed: kernels of transposed convolutions, those with dilated inputs.
    """

    position: dict[int, int] = dataclasses.field(default_factory=dict)
    flattened: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    transposed: set[int] = dataclasses.field(default_factory=set)


def call_order(apply: Callable, variables: Any, *args: Any, **kwargs: Any) -> CallOrder:
    """Follows every leaf of the variables through a forward pass; nothing is computed.

    Neither the names nor the order of a tree's keys tell this: JAX sorts the keys of every dict
    that passes through ``jax.jit`` or ``jax.eval_shape``, and Flax numbers the layers of each class
    on their own.

    Args:
        apply: function (variables, *args, **kwargs), such as ``model.apply``.
        variables: pytree of arrays or `jax.ShapeDtypeStruct`.
        *args, **kwargs: the other arguments; what is no array, such as ``train=False``, stays as it
            is.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> apply = lambda params, x: jax.nn.relu(x @ params["stem"]) @ params["head"]
        >>> params = {"stem": jnp.ones((3, 4)), "head": jnp.ones((4, 2))}
        >>> call_order(apply, params, jnp.ones((1, 3))).position
        {1: 0, 0: 1}
    """
    jaxpr, _, arrays = traced(apply, variables, args, kwargs)
    count = len(jax.tree.leaves(variables))
    order = CallOrder()
    _walk(
        jaxpr,
        {var: leaf for var, leaf in zip(jaxpr.invars, arrays, strict=True) if leaf < count},
        order,
    )
    return order


def _walk(jaxpr, known: dict, order: CallOrder) -> None:
    """Follows one program; ``known`` maps a variable to a leaf, to the shape flattened into it, or
    () if moved."""
    for eqn in jaxpr.eqns:
        inputs = [None if isinstance(var, Literal) else known.get(var) for var in eqn.invars]
        bodies = [body for body in programs(eqn.params) if len(body.invars) == len(inputs)]
        for body in bodies:
            inner = {
                var: value
                for var, value in zip(body.invars, inputs, strict=True)
                if value is not None
            }
            _walk(body, inner, order)
            outputs = [None if isinstance(var, Literal) else inner.get(var) for var in body.outvars]
            known |= dict(zip(eqn.outvars, outputs, strict=False))
        if not bodies:
            known[eqn.outvars[0]] = _follow(eqn, inputs, order)


def _follow(eqn, inputs: list, order: CallOrder) -> Any:
    """Notes the leaves that an operation uses, and returns what is known of its result."""
    operation = eqn.primitive.name
    if operation in UNALTERED:
        return inputs[0]
    leaves = [value for value in inputs if isinstance(value, int)]
    shapes = [value for value in inputs if isinstance(value, tuple)]
    for leaf in leaves:
        order.position.setdefault(leaf, len(order.position))
    if operation == "dot_general":
        order.flattened |= {leaf: shapes[0] for leaf in leaves if shapes and shapes[0]}
    if operation == "conv_general_dilated" and set(eqn.params["lhs_dilation"]) - {1}:
        order.transposed |= set(leaves)
    if operation == "transpose":
        return ()
    if operation == "reshape":
        return None if shapes else _flattened(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape)
    same = [
        value
        for value, var in zip(inputs, eqn.invars, strict=True)
        if var.aval.shape == eqn.outvars[0].aval.shape
    ]
    elementwise = operation not in ("dot_general", "conv_general_dilated")
    return (
        next((value for value in same if isinstance(value, tuple)), None) if elementwise else None
    )


def _flattened(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape (*spatial, channels) that a reshape flattens into one axis, or None."""
    for start in (1, 0):
        if len(before) - start > 1 and after == (*before[:start], math.prod(before[start:])):
            return before[start:]
    return None
