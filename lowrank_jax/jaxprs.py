"""The program of a forward pass, and the programs inside its equations."""

from collections.abc import Callable
from typing import Any

import jax


def traced(apply: Callable, variables: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, list, dict[int, Any]]:
    """Traces ``apply(variables, *args, **kwargs)``; what is no array stays as it is.

    Returns:
        The jaxpr; all (path, leaf) pairs of (variables, args, kwargs), those of the variables first; and the number
        of each leaf that is an input of the jaxpr, in the order of the inputs, to the leaf.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path((variables, args, kwargs))
    arrays = {i: leaf for i, (_, leaf) in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

    def forward(arrays):
        merged = [arrays.get(i, leaf) for i, (_, leaf) in enumerate(leaves)]
        variables, args, kwargs = jax.tree.unflatten(tree, merged)
        return apply(variables, *args, **kwargs)

    return jax.make_jaxpr(forward)(arrays).jaxpr, leaves, arrays


def programs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation, without their constants."""
    values = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    return [program for program in map(opened, values) if hasattr(program, "eqns")]


def opened(program: Any) -> Any:
    """A jaxpr without its constants, whichever of the two a JAX generation stores."""
    return getattr(program, "jaxpr", program)
