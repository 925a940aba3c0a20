"""Where a value inside a program comes from: which parameter, which of its axes, what became of it.

JAX hides this behind variables. The rules here say of every operation that moves entries what it
does to the axes, and of everything else that the value is changed. `trace` and `lowrank` both ask
here, so that `lowrank` runs what `trace` says.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lowrank_jax.factorization.axes import INPUTS, OUTPUTS

UNALTERED = (
    "convert_element_type",
    "copy",
    "name",
    "pvary",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
)
EACH = ("device_put", "optimization_barrier")  # each result is one operand, unaltered


@dataclasses.dataclass(frozen=True)
class Source:
    """A value that stems from one parameter.

    Attributes:
        path: name of the parameter's leaf, see `lowrank_jax.program.names`.
        shape: of the parameter as it is stored.
        dims: for each axis of the value the axes of the parameter that it is made of, outermost
            first; None once the parameter was changed by an operation that does more than move.
        gone: axes of the parameter of which one entry was taken, with its index; None is the index
            of a loop.
        flips: axes of the parameter that run backwards.
        changed: the operations that changed it.
    """

    path: str
    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...] | None
    gone: tuple[tuple[int, int | None], ...] = ()
    flips: frozenset[int] = frozenset()
    changed: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: str, shape: Sequence[int]) -> "Source":
        """The parameter itself."""
        return cls(path, tuple(shape), tuple((axis,) for axis in range(len(shape))))

    @property
    def as_stored(self) -> bool:
        """Whether the value is the whole parameter with its axes as they are stored."""
        return self == Source.of(self.path, self.shape)

    def after(self, operation: str) -> "Source":
        """The source of what an operation gives that changes the value."""
        return dataclasses.replace(self, dims=None, changed=(*self.changed, operation))

    def move(self, dims: Sequence[tuple[int, ...]]) -> "Source":
        """The same entries with other axes."""
        return dataclasses.replace(self, dims=tuple(dims))

    def kept(self) -> list[int]:
        """The axes of the parameter that the value still has, in stored order."""
        taken = {axis for axis, _ in self.gone}
        return [axis for axis in range(len(self.shape)) if axis not in taken]

    def entry(self, axis: int, index: int | None, keep: bool) -> "Source":
        """One entry along an axis of the value; the axis stays with size 1 if ``keep``."""
        if self.dims is None or len(self.dims[axis]) != 1:
            return self.after("slice")
        own = self.dims[axis][0]
        dims = [*self.dims[:axis], *([()] if keep else []), *self.dims[axis + 1 :]]
        if own in self.flips and index is not None:
            index = self.shape[own] - 1 - index
        gone, flips = (*self.gone, (own, index)), self.flips - {own}
        return dataclasses.replace(self, dims=tuple(dims), gone=gone, flips=flips)


def moved(eqn: Any, source: Source) -> Source | None:
    """The source of what an operation gives that only moves the entries of its first operand.

    Returns:
        None if the operation does more than that.
    """
    operation, dims = eqn.primitive.name, source.dims
    if dims is None or len(eqn.outvars) != 1:
        return None
    if operation in UNALTERED:
        return source if _keeps_floating(eqn) else None
    shape = eqn.outvars[0].aval.shape
    if operation == "transpose":
        return source.move([dims[axis] for axis in eqn.params["permutation"]])
    if operation == "rev":
        return _reversed(source, eqn.params["dimensions"])
    if operation == "squeeze":
        left = set(range(len(dims))) - set(eqn.params["dimensions"])
        return source.move([dims[axis] for axis in sorted(left)])
    if operation == "broadcast_in_dim":
        return _spread(source, eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, shape)
    if operation == "reshape":
        order = eqn.params["dimensions"]
        source = source if order is None else source.move([dims[axis] for axis in order])
        return _regroup(source, shape)
    if operation == "slice":
        return _sliced(eqn, source)
    return None


def _keeps_floating(eqn: Any) -> bool:
    """Factors in another floating type still multiply to the kernel, up to its rounding.

    Integers do not, and types of one byte are for quantisation.
    """
    types = [var.aval.dtype for var in (eqn.invars[0], eqn.outvars[0])]
    return all(jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1 for dtype in types)


def _reversed(source: Source, axes: Sequence[int]) -> Source | None:
    parts = [source.dims[axis] for axis in axes] if source.dims else []
    if any(len(part) > 1 for part in parts):
        return None
    return dataclasses.replace(source, flips=source.flips ^ {a for part in parts for a in part})


def _spread(source: Source, places: Sequence[int], before: Sequence[int], after: Sequence[int]):
    """Axes of size 1 beside those that there are; a value that is repeated has changed."""
    if source.dims is None or math.prod(before) != math.prod(after):
        return None
    dims: list[tuple[int, ...]] = [()] * len(after)
    for dim, place in zip(source.dims, places, strict=True):
        dims[place] = dim
    return source.move(dims)


def _sliced(eqn: Any, source: Source) -> Source | None:
    """One entry along some axes, all of them along the others."""
    before = eqn.invars[0].aval.shape
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    for axis, (size, start, limit) in enumerate(zip(before, starts, limits, strict=True)):
        if (start, limit) == (0, size) or source.dims is None:
            continue
        if limit - start != 1 or len(source.dims[axis]) != 1:
            return None
        source = source.entry(axis, start, keep=True)
    strides = eqn.params["strides"]
    return source if strides is None or set(strides) == {1} else None


def _regroup(source: Source, shape: tuple[int, ...]) -> Source | None:
    """Merges whole axes to a new shape; None if one would have to be split."""
    sizes = source.shape
    atoms = [axis for dim in source.dims or () for axis in dim if sizes[axis] != 1]
    dims = []
    for size in shape:
        taken: list[int] = []
        while math.prod(sizes[axis] for axis in taken) < size and atoms:
            taken.append(atoms.pop(0))
        if math.prod(sizes[axis] for axis in taken) != size:
            return None
        dims.append(tuple(taken))
    return source.move(dims)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an operation reads a kernel.

    Attributes:
        axes: letters of the stored axes without those of a stack, such as "HWIO"; I and O are the
            channels, the others spatial.
        places: letter to the axis of the parameter.
        stack: axes of the parameter that the operation has merged into the outputs.
        reason: why the kernel's axes cannot be told; "" if they can.
    """

    axes: str = ""
    places: tuple[tuple[str, int], ...] = ()
    stack: tuple[int, ...] = ()
    reason: str = ""


def layout(source: Source | None, letters: dict[int, str]) -> Layout:
    """The stored layout of a kernel that an operation reads.

    Args:
        source: of the kernel; None if the program computes it from the inputs.
        letters: axis of the value to its letter.
    """
    if source is None or source.dims is None:
        return Layout(reason=_why_unknown(source))
    if not 3 <= len(letters) <= 5:
        axes = len(letters) - 2
        return Layout(reason=f"it is a convolution of {axes} spatial axes; 1 to 3 are supported")
    return _read(source, source.dims, letters)


def _why_unknown(source: Source | None) -> str:
    if source is None:
        return "its kernel is computed by the program"
    names = ", ".join(dict.fromkeys(source.changed))
    return f"its kernel is changed by {names} before it is used"


def product_layout(source: Source | None, roles: dict[int, str]) -> Layout:
    """The stored layout of a matrix that a product reads.

    Args:
        source: as in `layout`.
        roles: axis of the value to "I" where it is contracted, "O" where it is free, and "." where
            it is an axis of the batch, so that a stack of matrices runs at once.
    """
    if source is None or source.dims is None:
        return Layout(reason=_why_unknown(source))
    if source.flips:
        return Layout(reason="its kernel is reversed before it is used")
    own = {axis: roles[place] for place, dim in enumerate(source.dims) for axis in dim}
    letters = _letters_of_product(source, own)
    axes = "".join(letters).lstrip(".")
    if not {"I", "O"} <= set(axes):
        return Layout(reason="its kernel is no matrix")
    if "." in axes or "?" in axes:
        return Layout(reason="the stack that its kernel is part of is not along the first axis")
    places = tuple((letter, axis) for axis, letter in enumerate(letters) if letter != ".")
    return Layout(axes, places, tuple(axis for axis, role in own.items() if role == "."))


def _letters_of_product(source: Source, roles: Mapping[int, str]) -> list[str]:
    """The letter of each stored axis; the last of the inputs is I, the last of the outputs O."""
    found, before = [], "."
    kept = source.kept()
    for axis in range(len(source.shape)):
        # An axis of size 1 that a reshape has dropped belongs to what is beside it.
        before = roles.get(axis, before) if axis in kept else "."
        found.append(before)
    for role, names in (("I", INPUTS), ("O", OUTPUTS)):
        places = [axis for axis, own in enumerate(found) if own == role]
        for letter, axis in zip(names.ljust(len(places), "?"), places[::-1], strict=False):
            found[axis] = letter
    return found


def _read(source: Source, dims: Sequence[tuple[int, ...]], letters: dict[int, str]) -> Layout:
    names: dict[int, str] = {}
    stack: tuple[int, ...] = ()
    for axis, dim in enumerate(dims):
        *outer, own = dim or (None,)
        if outer and letters[axis] != "O":
            return Layout(reason="its kernel is reshaped before it is used")
        stack += tuple(outer)
        if own is not None:
            names[own] = letters[axis]
    # Axes of size 1 lose their identity in a reshape; any order of theirs is right.
    lost = [letters[axis] for axis, dim in enumerate(dims) if not dim]
    kept = source.kept()
    ones = [axis for axis in kept if source.shape[axis] == 1 and axis not in names]
    names |= dict(zip(ones[len(ones) - len(lost) :], lost, strict=False))
    axes = "".join(names.get(axis, ".") for axis in range(len(source.shape)))
    own_axes = axes.lstrip(".")
    if own_axes != axes.replace(".", "") or len(own_axes) != len(letters):
        return Layout(reason="the stack that its kernel is part of is not along the first axis")
    places = tuple((letter, axis) for axis, letter in names.items())
    return Layout(own_axes, places, stack)
