"""Trees of arrays, and the arrays by names whose parts are joined by "/"."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def named(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a tree by their paths, as `nest` takes them apart.

    An empty mapping leaves no trace.

    Example:
        >>> list(named({"params": {"Conv_0": {"kernel": np.ones(3), "bias": np.ones(1)}}}))
        ['params/Conv_0/kernel', 'params/Conv_0/bias']
    """
    check_tree(variables)
    flat = flatten_dict(variables)
    for key in flat:
        if wrong := [part for part in key if not isinstance(part, str) or "/" in part]:
            raise ValueError(
                f"The key {wrong[0]!r} of {key} must be a string without '/', the separator of the "
                "names."
            )
    return {"/".join(key): as_array(leaf) for key, leaf in flat.items()}


def check_tree(variables: Any) -> None:
    """Refuses what is no mapping of names."""
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"A {type(variables).__name__} is no tree of names; give a mapping such as "
            '{"params": ...}.'
        )


def nest(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested dicts by the parts of the names between "/".

    Names without it, as PyTorch's, stay as they are.

    Example:
        >>> nest({"params/Conv_0/kernel": 1, "layer1.0.conv1.weight": 2})
        {'params': {'Conv_0': {'kernel': 1}}, 'layer1.0.conv1.weight': 2}
    """
    for name in arrays:
        parts = name.split("/")
        for end in range(1, len(parts)):
            if (outer := "/".join(parts[:end])) in arrays:
                raise ValueError(f"{outer!r} is an array, and {name!r} lies within it")
    return unflatten_dict(dict(arrays), sep="/")


def as_array(leaf: Any) -> np.ndarray:
    """A leaf as a numpy array in the order of C, as the formats write memory."""
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float | complex):
        raise ValueError(
            f"A leaf is a {type(leaf).__name__}, not an array: {leaf!r:.60}. Give arrays."
        )
    return np.asarray(leaf, order="C")


def natural(name: str) -> list[str | int]:
    """A sorting key by which "Conv_2" comes before "Conv_10".

    Example:
        >>> sorted(["Conv_10", "Conv_2"], key=natural)
        ['Conv_2', 'Conv_10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
