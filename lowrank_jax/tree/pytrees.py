"""Any pytree as a nested dict of its leaves, and back: the way in for models that are no dicts."""

from typing import Any

import chex
import jax
from flax.traverse_util import flatten_dict, unflatten_dict


def to_dict(tree: chex.ArrayTree) -> dict[str, Any]:
    """The leaves of a pytree as a nested dict, keyed by attribute, index or key.

    Example:
        >>> to_dict({"layers": [{"weight": 1}, {"weight": 2}]})
        {'layers': {'0': {'weight': 1}, '1': {'weight': 2}}}
    """
    return unflatten_dict(
        {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    )


def from_dict(leaves: dict[str, Any], like: chex.ArrayTree) -> Any:
    """Puts the leaves of `to_dict` back into a pytree.

    Args:
        leaves: nested dict with exactly the leaves of the pytree.
        like: the pytree that gives the structure.

    Raises:
        ValueError: leaves are missing or too many, as they are before `reconstruct`.

    Example:
        >>> from_dict({"layers": {"0": {"weight": 1}}}, like={"layers": [{"weight": 0}]})
        {'layers': [{'weight': 1}]}
    """
    flat = flatten_dict(leaves)
    keys = [_keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    if differ := sorted("/".join(key) for key in set(flat) ^ set(keys)):
        raise ValueError(
            f"The leaves are not those of the pytree, they differ at {differ[:4]}; call reconstruct first."
        )
    return jax.tree.unflatten(jax.tree.structure(like), [flat[key] for key in keys])


def _keys(path: tuple) -> tuple[str, ...]:
    return tuple(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
