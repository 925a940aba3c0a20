"""The leaves of a tree by their names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lowrank_jax.factorization.factors import is_factors
from lowrank_jax.program.names import leaf_names
from lowrank_jax.tree.suggest import suggest


def named_leaves(tree: Any) -> dict[str, Any]:
    """Name of every leaf to the leaf; the factors of a kernel are one leaf.

    Example:
        >>> named_leaves({"params": {"stem": {"kernel": 1, "bias": 2}}})
        {'stem/bias': 2, 'stem': 1}
    """
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree, is_leaf=is_factors), strict=True))


def factored_leaves(tree: Any) -> dict[str, Any]:
    """Path of every layer that has factors in a tree to their node.

    Example:
        >>> import numpy as np
        >>> pair = {"left_factor": np.ones((4, 1)), "right_factor": np.ones((1, 3))}
        >>> list(factored_leaves({"dense": pair, "bias": np.ones(3)}))
        ['dense']
    """
    return {name: leaf for name, leaf in named_leaves(tree).items() if is_factors(leaf)}


def map_named(change: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree whose leaves are a function of their names and of what they were.

    Example:
        >>> map_named(lambda name, leaf: f"{name} was {leaf}", {"stem": {"kernel": 1}})
        {'stem': {'kernel': 'stem was 1'}}
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_factors)
    pairs = zip(leaf_names(tree), leaves, strict=True)
    return jax.tree.unflatten(structure, [change(name, leaf) for name, leaf in pairs])


def find_leaf(path: str, leaves: Mapping[str, Any]) -> Any:
    """The leaf of a name, or an error that suggests the nearest ones."""
    if path in leaves:
        return leaves[path]
    kernels = sorted(name for name, leaf in leaves.items() if _may_be_kernel(leaf))
    advice = suggest(path, kernels, "the tree holds no array of two or more axes at all.")
    raise ValueError(f"No kernel at {path!r}; {advice}")


def _may_be_kernel(leaf: Any) -> bool:
    return is_factors(leaf) or getattr(leaf, "ndim", 0) > 1
