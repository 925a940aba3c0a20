"""Where factors lie on a mesh: as their kernel does along the axes that they share with it."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.factorization.layout import split_axes
from lowrank_jax.program.provenance import Source


def shared_axes(axes: str, first: str, index: int) -> str:
    """The letters of the axes that a factor shares with its kernel; "." is a stack.

    Example:
        >>> shared_axes("HWIO", "vertical", 0), shared_axes("HWIO", "vertical", 1)
        ('HI.', 'WO.')
    """
    return split_axes(axes, first)[index] + "IO"[index] + "."


def factor_sharding(sharding: Any, source: Source, axes: str, first: str, index: int) -> Any:
    """The sharding of a factor where its kernel has one, as the program has it at this place."""
    if not isinstance(sharding, NamedSharding) or source.dims is None:
        return sharding
    by_axis = {
        dim[0]: part for dim, part in zip(source.dims, sharding.spec, strict=False) if len(dim) == 1
    }
    letters = "." * (len(source.shape) - len(axes)) + axes
    own = shared_axes(axes, first, index)
    spec = [by_axis.get(axis) if letters[axis] in own else None for axis in source.kept()]
    return sharding.update(spec=PartitionSpec(*spec))


def dense_sharding(pair: Sequence[Any], axes: str, first: str) -> NamedSharding | None:
    """The sharding of a kernel in its type, where the axes of its mesh are explicit."""
    shardings = [s for x in pair if isinstance(s := jax.typeof(x).sharding, NamedSharding)]
    if len(shardings) < 2 or not all(s.mesh.are_all_axes_explicit for s in shardings):
        return None
    count = len(pair[0].shape)
    letters = "." * (count - len(axes)) + axes
    specs = [[*s.spec, *[None] * (count - len(s.spec))] for s in shardings]
    owner = [0 if letter in shared_axes(axes, first, 0) else 1 for letter in letters]
    spec = [specs[index][axis] for axis, index in enumerate(owner)]
    return NamedSharding(shardings[0].mesh, PartitionSpec(*spec))
