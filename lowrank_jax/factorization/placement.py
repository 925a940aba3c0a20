"""Where factors lie on a mesh: as their kernel does along the axes that they share with it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from lowrank_jax.factorization.axes import own_letters


def shared_axes(axes: str, first: str, index: int) -> str:
    """The letters of the axes that a factor shares with its kernel; "." is a stack.

    Example:
        >>> import lowrank_jax
        >>> shared_axes("HWIO", "vertical", 0), shared_axes("HWIO", "vertical", 1)
        ('HI.', 'WO.')
    """
    return own_letters(axes, first, index) + "."


def place_of(array: jax.Array) -> Sharding | None:
    """Where an array with values is; None where they are not all at hand."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return None
    return array.sharding


def factor_sharding(sharding: Any, ndim: int, axes: str, first: str, index: int) -> Any:
    """The sharding of a factor where its kernel, as it is stored, has one."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    parts = factor_parts(tuple(sharding.spec), ndim, axes, first, index)
    return sharding.update(spec=PartitionSpec(*parts))


def factor_parts(
    spec: Sequence[Any], ndim: int, axes: str, first: str, index: int
) -> tuple[Any, ...]:
    """For each axis of a factor the mesh axis over which its kernel is split there, or None."""
    letters = "." * (ndim - len(axes)) + axes
    parts = [*spec, *[None] * (ndim - len(spec))]
    own = shared_axes(axes, first, index)
    return tuple(part if x in own else None for part, x in zip(parts, letters, strict=True))


def typed_sharding(array: Any) -> NamedSharding | None:
    """The sharding in an array's type, on a mesh with explicit axes."""
    sharding = None if isinstance(array, np.ndarray) else jax.typeof(array).sharding
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def gathered(array: Any) -> Any:
    """An array that every device has whole, where its type says that it has not."""
    sharding = typed_sharding(array)
    if sharding is None or not any(sharding.spec):
        return array
    return jax.sharding.reshard(array, sharding.update(spec=PartitionSpec()))


def placed(array: Any, sharding: NamedSharding | None) -> Any:
    """An array with a sharding in its type."""
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def dense_sharding(pair: Sequence[Any], axes: str) -> NamedSharding | None:
    """The sharding of a kernel in its type where its factors have some."""
    shardings = [s for x in pair if (s := typed_sharding(x)) is not None]
    if len(shardings) < 2:
        return None
    ndim = len(pair[0].shape)
    letters = "." * (ndim - len(axes)) + axes
    specs = [[*s.spec, *[None] * (ndim - len(s.spec))] for s in shardings]
    own = {"I": lambda one, two: one, "O": lambda one, two: two}
    spec = [own.get(x, _either)(*parts) for x, *parts in zip(letters, *specs, strict=True)]
    return shardings[0].update(spec=PartitionSpec(*spec))


def _either(one: Any, two: Any) -> Any:
    return two if one is None else one
