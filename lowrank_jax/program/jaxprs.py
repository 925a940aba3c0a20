"""The program of a forward pass, and the programs inside its equations."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def traced(
    apply: Callable, variables: Any, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, list, dict[int, Any]]:
    """Traces ``apply(variables, *args, **kwargs)``; what is no array stays as it is.

    Returns:
        The jaxpr; all (path, leaf) pairs of (variables, args, kwargs), those of the variables
        first; and the number of each leaf that is an input of the jaxpr, in the order of the
        inputs, to the leaf.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path((variables, args, kwargs))
    arrays = {
        i: leaf
        for i, (_, leaf) in enumerate(leaves)
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }

    def forward(arrays):
        merged = [arrays.get(i, leaf) for i, (_, leaf) in enumerate(leaves)]
        variables, args, kwargs = jax.tree.unflatten(tree, merged)
        return apply(variables, *args, **kwargs)

    return jax.make_jaxpr(forward)(arrays).jaxpr, leaves, arrays


def programs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation, without their constants."""
    values = jax.tree.leaves(
        list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    )
    return [program for program in map(opened, values) if hasattr(program, "eqns")]


def opened(program: Any) -> Any:
    """A jaxpr without its constants, whichever of the two a JAX generation stores."""
    return getattr(program, "jaxpr", program)


def coarsest_eps(program: Any) -> float:
    """The machine epsilon of the coarsest floating type that a program computes in; 0 if it
    computes in none.

    Example:
        >>> coarsest_eps(jax.make_jaxpr(lambda x: x.astype("bfloat16").sum().astype("float32"))(1.0))
        0.0078125
    """
    types = {var.aval.dtype for var in _results(opened(program)) if hasattr(var.aval, "dtype")}
    floating = [dtype for dtype in types if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floating), default=0.0)


def _results(program: Any) -> Iterator[Any]:
    for eqn in program.eqns:
        yield from eqn.outvars
        for inner in programs(eqn.params):
            yield from _results(inner)
