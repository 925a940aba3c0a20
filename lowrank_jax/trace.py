"""What a forward pass does with its convolution kernels, read from its jaxpr."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal


@dataclasses.dataclass(frozen=True)
class ConvUse:
    """One use of one kernel by a convolution.

    Attributes:
        path: the kernel's path in the variables without "params/" and "/kernel"; "" if it is computed.
        kernel_shape: as stored, HWIO in Flax.
        weights: entries of the kernel.
        multiply_adds: products summed over the batch given.
    """

    path: str
    kernel_shape: tuple[int, ...]
    weights: int
    multiply_adds: int


def trace(apply: Callable, variables: Any, *args: Any) -> list[ConvUse]:
    """Lists the convolutions of a forward pass in program order; nothing is computed.

    Follows calls (``jit``, ``custom_jvp``, ``remat``) and ``scan``, whose body counts once per iteration.

    Args:
        apply: function (variables, *args), such as ``model.apply``.
        variables: nested mapping; arrays or `jax.ShapeDtypeStruct`.
        *args: the other arguments; multiply-adds are for this batch size.

    Raises:
        ValueError: a convolution stands in a ``while`` or a ``cond``, whose number of runs is not known.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Conv(16, (3, 3)), jnp.zeros((1, 8, 8, 4))
        >>> trace(model.apply, model.init(jax.random.key(0), images), images)[0].multiply_adds
        36864
    """
    closed = jax.make_jaxpr(apply)(variables, *args)
    leaves = [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    paths = dict(zip(closed.jaxpr.invars, leaves, strict=False))
    return list(_walk(closed.jaxpr, paths, 1))


def name(path: tuple) -> str:
    """A tree path as "block/Conv_0", without the collection and the leaf's name "kernel"."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    parts = parts[1:] if parts[:1] == ["params"] else parts
    return "/".join(parts[:-1] if parts[-1:] == ["kernel"] else parts)


def _walk(jaxpr, paths: dict, repeats: int) -> Iterator[ConvUse]:
    for eqn in jaxpr.eqns:
        known = [None if isinstance(var, Literal) else paths.get(var) for var in eqn.invars]
        if eqn.primitive.name == "conv_general_dilated":
            yield _use(eqn, known[1] or "", repeats)
        elif eqn.primitive.name == "convert_element_type":
            paths[eqn.outvars[0]] = known[0]
        for inner in _inner(eqn):
            loops = repeats * eqn.params.get("length", 1)
            yield from _walk(inner, dict(zip(inner.invars, known, strict=False)), loops)


def _inner(eqn) -> list[Any]:
    """The programs inside an equation whose inputs are the equation's own."""
    found = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)]
    inner: list[Any] = [value for value in found if hasattr(value, "eqns")]
    if eqn.primitive.name in ("while", "cond") and any(list(_walk(body, {}, 1)) for body in inner):
        raise ValueError(f"A convolution stands in a {eqn.primitive.name!r}: how often it runs cannot be known.")
    return [body for body in inner if len(body.invars) == len(eqn.invars)]  # others, such as reducers, hold no kernel


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _use(eqn, path: str, repeats: int) -> ConvUse:
    kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    out_channels = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    weights = math.prod(kernel)
    return ConvUse(path, tuple(kernel), weights, repeats * math.prod(out) * weights // out_channels)
