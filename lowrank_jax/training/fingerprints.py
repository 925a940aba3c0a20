"""Fingerprints of data and parameters, by which a run knows its own again."""

import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lowrank_jax.program.names import leaf_names
from lowrank_jax.training.checkpoints import plain

ROWS = 64  # of each array, evenly spaced: enough to tell other data, and quick for large ones


def fingerprint(tree: Any) -> str:
    """A short text that tells most other arrays apart, made from up to 64 rows of each.

    Changes between these rows are not seen. The same numbers of another type, such as int32 in
    place of int64, count as others.

    Args:
        tree: pytree of arrays.

    Example:
        >>> one = fingerprint({"x": np.arange(6)})
        >>> one == fingerprint({"x": np.arange(6)}), one == fingerprint({"x": np.arange(6)[::-1]})
        (True, False)
    """
    total = hashlib.blake2b(digest_size=6)
    for name, leaf in _named(tree):
        total.update(f"{name} {np.shape(leaf)}".encode())
        total.update(_rows(leaf))
    return total.hexdigest()


def magnitudes(tree: Any) -> dict[str, float]:
    """The sum of the absolute values of each leaf, by its name.

    The sums are nearly the same where the tree is computed anew, on another machine or with other
    signs of the components of factors.

    Example:
        >>> magnitudes({"x": np.array([1.0, -2.0])})
        {'x': 3.0}
    """
    arrays = {name: np.asarray(plain(leaf)) for name, leaf in _named(tree)}
    return {name: float(np.abs(x).sum(dtype=np.float64)) for name, x in arrays.items()}


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves with their names, each factor for itself."""
    names = leaf_names(tree, is_leaf=lambda _: False)
    return zip(names, jax.tree.leaves(tree), strict=True)


def _rows(leaf: Any) -> bytes:
    array = np.asarray(plain(leaf))  # on the host, where picking rows compiles nothing
    if not array.ndim or not len(array):
        return array.tobytes()
    places = np.unique(np.linspace(0, len(array) - 1, ROWS).astype(int))
    return array[places].tobytes()
