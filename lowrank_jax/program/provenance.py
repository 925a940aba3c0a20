"""Where a value inside a program comes from: which parameter, and which of its axes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

LEAVES = ("kernel", "weight", "w")  # names of kernels in Flax and Keras, PyTorch and Equinox, Haiku


def name(path: Sequence[Any]) -> str:
    """A tree path as "block/Conv_0", without the collection "params" and the leaf's name."""
    parts = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    parts = [part.lstrip(".") for part in parts]
    parts = parts[:-1] if parts[-1:] == ["value"] else parts  # the variable of an NNX state
    parts = parts[1:] if parts[:1] == ["params"] else parts
    return "/".join(parts[:-1] if parts[-1:] and parts[-1] in LEAVES else parts)


@dataclasses.dataclass(frozen=True)
class Source:
    """A value that stems from one parameter.

    ``dims`` says for each axis of the value which axes of the parameter it is made of, or is None
    once the parameter was ``changed`` by operations that do more than move its entries.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...] | None
    changed: tuple[str, ...] = ()

    def after(self, operation: str) -> "Source":
        return dataclasses.replace(self, dims=None, changed=(*self.changed, operation))

    def move(self, dims: Sequence[tuple[int, ...]]) -> "Source":
        return dataclasses.replace(self, dims=tuple(dims))


def sliced(source: Source) -> Source:
    """One entry along the first axis, as a scan hands it to its body."""
    return (
        source.move(source.dims[1:])
        if source.dims and len(source.dims[0]) == 1
        else source.after("scan")
    )


def moved(eqn, source: Source) -> Source | None:
    """The source of an operation that moves entries without changing them; None if it is no such
    operation."""
    operation, dims, shape = eqn.primitive.name, source.dims or (), eqn.outvars[0].aval.shape
    if operation == "transpose":
        return source.move([dims[axis] for axis in eqn.params["permutation"]])
    if operation == "reshape" and eqn.params["dimensions"] is not None:
        source = source.move([dims[axis] for axis in eqn.params["dimensions"]])
    if operation in ("reshape", "squeeze", "expand_dims") or (
        operation == "broadcast_in_dim"
        and math.prod(shape) == math.prod(source.shape[a] for d in dims for a in d)
    ):
        return _regroup(source, shape)
    return None


def _regroup(source: Source, shape: tuple[int, ...]) -> Source | None:
    """Merges whole axes to a new shape; None if one would have to be split."""
    atoms = [axis for dim in source.dims or () for axis in dim if source.shape[axis] != 1]
    dims = []
    for size in shape:
        taken: list[int] = []
        while math.prod(source.shape[axis] for axis in taken) < size and atoms:
            taken.append(atoms.pop(0))
        if math.prod(source.shape[axis] for axis in taken) != size:
            return None
        dims.append(tuple(taken))
    return source.move(dims)


def layout(source: Source | None, letters: dict[int, str]) -> tuple[str, int, str]:
    """The stored layout of a kernel, the size of the stack merged into its outputs, and what is
    wrong with it."""
    if source is None:
        return "", 1, "its kernel is computed by the program"
    if source.dims is None:
        return (
            "",
            1,
            f"its kernel is changed by {', '.join(dict.fromkeys(source.changed))} before it is used",
        )
    names: dict[int, str] = {}
    stack: tuple[int, ...] = ()
    for axis, dim in enumerate(source.dims):
        *outer, own = dim or (None,)
        if outer and letters.get(axis) != "O":
            return "", 1, "its kernel is reshaped before it is used"
        stack += tuple(outer)
        if own is not None:
            names[own] = letters.get(axis, "")
    lost = [letters.get(axis, "") for axis, dim in enumerate(source.dims) if not dim]
    if lost:  # axes of size 1 lose their identity in a reshape; any order of theirs is right
        ones = [axis for axis, size in enumerate(source.shape) if size == 1 and axis not in names]
        names |= dict(zip(ones[-len(lost) :], lost, strict=False))
    axes = "".join(names.get(axis, ".") for axis in range(len(source.shape)))
    if axes.lstrip(".") != axes.replace(".", "") or len(axes.lstrip(".")) != len(letters):
        return "", 1, "the stack that its kernel is part of is not along the first axis"
    return axes.lstrip("."), math.prod(source.shape[axis] for axis in stack), ""
