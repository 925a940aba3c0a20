"""Trees of arrays, and the arrays by names whose parts are joined by "/"."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

SEPARATOR = re.compile(r"(?<!\\)/")  # between the parts of a name
AMBIGUOUS = re.compile(r"\\(/|$)")  # within a part
INTEGER = re.compile(r"\[(0|-?[1-9][0-9]*)\]")  # an int among the parts of a name


def named(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    r"""The arrays of a tree by their paths, as `nest` takes them apart.

    An empty mapping leaves no trace. A key that is an int, as in the states of NNX, stands in
    brackets. A "/" within a key, as Haiku and `nn.SpectralNorm` have, has a backslash before it.

    Example:
        >>> list(named({"params": {"Conv_0": {"kernel": np.ones(3), "bias": np.ones(1)}}}))
        ['params/Conv_0/kernel', 'params/Conv_0/bias']
        >>> list(named({"layers": {0: {"kernel": np.ones(3)}}}))
        ['layers/[0]/kernel']
        >>> print(*named({"mlp/~/linear": {"w": np.ones(3)}}))
        mlp\/~\/linear/w
    """
    flat = flatten_dict(plain(variables))
    return {"/".join(_part(part, key) for part in key): leaf for key, leaf in flat.items()}


def plain(variables: Any) -> dict[Any, Any]:
    """Nested dicts of numpy arrays in place of any mapping, of variables of NNX among them.

    Raises:
        ValueError: it is no mapping of names, or a leaf is no array.
    """
    if not isinstance(variables, Mapping):
        raise ValueError(
            f"A {type(variables).__name__} is no tree of names; give a mapping such as "
            '{"params": ...}, or nnx.state(model) of a model of NNX.'
        )
    return {key: _plain(value) for key, value in variables.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return plain(value)
    stored = getattr(value, "get_raw_value", None)  # of a variable of NNX
    return as_array(value if stored is None else stored())


def _part(part: Any, key: tuple) -> str:
    """A key as a part of a name, from which `_key` makes the same key."""
    if type(part) is int:
        return f"[{part}]"
    if not isinstance(part, str) or AMBIGUOUS.search(part) or INTEGER.fullmatch(part):
        raise ValueError(
            f"The key {part!r} of {key} must be an int, or a string that has no backslash before a "
            "'/' or at its end, and is not of the form '[0]', which stands for an int. Rename it."
        )
    return part.replace("/", "\\/")


def _key(part: str) -> str | int:
    found = INTEGER.fullmatch(part)
    return int(found[1]) if found else part.replace("\\/", "/")


def nest(arrays: Mapping[str, np.ndarray]) -> dict[Any, Any]:
    """Nested dicts by the parts of the names between "/".

    Names without "/", such as PyTorch's, stay as they are.

    Raises:
        ValueError: a name lies within an array.

    Example:
        >>> nest({"params/Conv_0/kernel": 1, "layer1.0.conv1.weight": 2})
        {'params': {'Conv_0': {'kernel': 1}}, 'layer1.0.conv1.weight': 2}
        >>> nest({"layers/[0]/kernel": 1, "layers/[1]/kernel": 2})
        {'layers': {0: {'kernel': 1}, 1: {'kernel': 2}}}
    """
    for name in arrays:
        parts = SEPARATOR.split(name)
        for end in range(1, len(parts)):
            if (outer := "/".join(parts[:end])) in arrays:
                raise ValueError(f"{outer!r} is an array, and {name!r} lies within it")
    return unflatten_dict(
        {tuple(map(_key, SEPARATOR.split(name))): x for name, x in arrays.items()}
    )


def as_array(leaf: Any) -> np.ndarray:
    """A leaf as a numpy array in the order of C, as the formats write memory.

    Raises:
        ValueError: the leaf is no array, or a random key.
    """
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array | int | float | complex):
        raise ValueError(
            f"A leaf is a {type(leaf).__name__}, not an array: {' '.join(repr(leaf).split()):.60}. "
            "Give a tree of arrays; a module of Equinox is written by its own "
            "eqx.tree_serialise_leaves."
        )
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"A leaf is a random key, {leaf.dtype}, which no format keeps. Leave it out, as "
            "nnx.state(model, nnx.Not(nnx.RngState)) does, or give jax.random.key_data(key)."
        )
    return np.asarray(leaf, order="C")


def natural(name: str) -> list[str | int]:
    """A sorting key by which "Conv_2" comes before "Conv_10".

    Example:
        >>> sorted(["Conv_10", "Conv_2"], key=natural)
        ['Conv_2', 'Conv_10']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
