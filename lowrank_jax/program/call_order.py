"""In which order a forward pass uses its parameters, and which of them meet flattened features;
from its jaxpr."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal

from lowrank_jax.program.flattening import SAME_ORDER, Flat, Lost, State, after
from lowrank_jax.program.jaxprs import programs
from lowrank_jax.program.traced import traced

Leaves = frozenset[int]
Known = dict[Any, Leaves | State]


@dataclasses.dataclass
class CallOrder:
    """What `call_order` found; leaves are numbered in the order in which JAX flattens the
    variables.

    Attributes:
        position: leaf to the place of its first use among those of all leaves; a leaf never used is
            missing.
        flattened: leaf to the order of the features that it meets, for kernels of dense layers and
            for normalisations of flattened feature maps.
        lost: leaf to the operation after which that order is not known.
        transposed: kernels of transposed convolutions.
    """

    position: dict[int, int] = dataclasses.field(default_factory=dict)
    flattened: dict[int, Flat] = dataclasses.field(default_factory=dict)
    lost: dict[int, str] = dataclasses.field(default_factory=dict)
    transposed: set[int] = dataclasses.field(default_factory=set)

    def meet(self, leaf: int, state: State) -> None:
        """Notes that a leaf is used with features in some order."""
        if isinstance(state, Flat):
            self.flattened[leaf] = state
        if isinstance(state, Lost):
            self.lost[leaf] = state.reason


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
    program, _, arrays = traced(apply, variables, args, kwargs)
    jaxpr = program.jaxpr
    count = len(jax.tree.leaves(variables))
    order = CallOrder()
    leaves = zip(jaxpr.invars, arrays, strict=True)
    known: Known = {}
    known.update((var, frozenset([leaf])) for var, leaf in leaves if leaf < count)
    _visit(jaxpr, known, order)
    return order


def _visit(jaxpr: Any, known: Known, order: CallOrder) -> None:
    """Follows one program; ``known`` maps a variable to the leaves that it is made of, or to what
    is known of its axes."""
    for eqn in jaxpr.eqns:
        inputs = [None if isinstance(var, Literal) else known.get(var) for var in eqn.invars]
        bodies = [body for body in programs(eqn.params) if len(body.invars) == len(inputs)]
        for body in bodies:
            given = zip(body.invars, inputs, strict=True)
            inner: Known = {var: value for var, value in given if value is not None}
            _visit(body, inner, order)
            outputs = [None if isinstance(var, Literal) else inner.get(var) for var in body.outvars]
            known |= dict(zip(eqn.outvars, outputs, strict=False))
        if not bodies and eqn.outvars:
            known[eqn.outvars[0]] = _follow(eqn, inputs, order)


def _follow(eqn: Any, inputs: list, order: CallOrder) -> Leaves | State:
    """Notes the leaves that an operation uses, and returns what is known of its result."""
    name = eqn.primitive.name
    if name in ("convert_element_type", "copy"):
        return inputs[0]
    leaves = [value if isinstance(value, frozenset) else None for value in inputs]
    states = [None if isinstance(value, frozenset) else value for value in inputs]
    every = frozenset[int]().union(*(own for own in leaves if own))
    for leaf in sorted(every):
        order.position.setdefault(leaf, len(order.position))
    if name == "conv_general_dilated" and _is_transposed(eqn):
        order.transposed |= every
    for leaf, state in _meetings(eqn, leaves, states):
        order.meet(leaf, state)
    if every and not any(states) and name not in ("conv_general_dilated", "dot_general"):
        return every if name in (*SAME_ORDER, "reshape") or _is_elementwise(eqn) else None
    return after(eqn, states)


def _meetings(eqn: Any, leaves: list, states: list) -> list[tuple[int, State]]:
    """The leaves that an operation uses along the last axis of flattened features."""
    found = [(i, state) for i, state in enumerate(states) if isinstance(state, Flat | Lost)]
    if not found:
        return []
    index, state = found[0]
    last = len(eqn.invars[index].aval.shape) - 1
    if eqn.primitive.name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0][index]
        met = tuple(contracted) == (last,)
    else:
        met = _is_elementwise(eqn)
    if not met:
        return []
    arrays = [own for own, var in zip(leaves, eqn.invars, strict=True) if own and var.aval.ndim > 0]
    return [(leaf, state) for own in arrays for leaf in own]


def _is_elementwise(eqn: Any) -> bool:
    """Whether all operands have the shape of the result, but for axes of size one."""
    out = eqn.outvars[0].aval.shape
    shapes = [var.aval.shape for var in eqn.invars if var.aval.shape]
    same = all(len(shape) == len(out) for shape in shapes)
    return same and all(n in (1, size) for own in shapes for n, size in zip(own, out, strict=True))


def _is_transposed(eqn: Any) -> bool:
    """Whether a convolution is a transposed one, which with stride 1 the traceback alone tells."""
    if set(eqn.params["lhs_dilation"]) - {1}:
        return True
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback else []
    return any(frame.function_name == "conv_transpose" for frame in frames)
