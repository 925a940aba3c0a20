"""A kernel as a value of a program that runs: its numbers, or factors in their place."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import with_sharding_constraint

from lowrank_jax.factorization.merging import merge
from lowrank_jax.factorization.placement import shared_axes
from lowrank_jax.program.placement import factor_sharding
from lowrank_jax.program.provenance import UNALTERED, Source, moved
from lowrank_jax.program.reading import Reading, stored_letters

Pair = tuple[jax.Array, jax.Array]
Bind = Callable[..., list]  # runs an equation on arrays, with other parameters where they are given


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parameter on its way through a program.

    Attributes:
        source: which parameter it is, and what was done to its axes.
        axes: layout of the factors; "" where there are none.
        first: name of the form of the factors.
        value: the dense kernel as the program has it here; None where only factors run.
        factors: both factors as they are stored, without the axes that are gone; what moves axes is
            noted in the source alone.
    """

    source: Source = dataclasses.field(metadata={"static": True})
    axes: str = dataclasses.field(metadata={"static": True})
    first: str = dataclasses.field(metadata={"static": True})
    value: jax.Array | None
    factors: Pair | None

    @classmethod
    def dense(cls, source: Source, value: jax.Array) -> "Kernel":
        """A kernel without factors."""
        return cls(source, "", "vertical", value, None)

    @classmethod
    def factored(cls, source: Source, axes: str, first: str, factors: Pair) -> "Kernel":
        """A kernel that only its factors stand for."""
        return cls(source, axes, first, None, factors)

    @property
    def groups(self) -> int:
        """For how many groups of channels it was decomposed."""
        if self.factors is None:
            return 1
        letters = self.letters
        one, two = (dict(zip(letters, x.shape, strict=True)) for x in self.factors)
        return one["O"] // two["I"]

    @property
    def letters(self) -> list[str]:
        """The letter of each axis of the factors; "." for a stack."""
        stored = stored_letters(self.source, self.axes)
        return [stored[axis] for axis in self.source.kept()]

    def shared(self, index: int) -> str:
        """The letters of the axes that a factor shares with the kernel."""
        return shared_axes(self.axes, self.first, index)

    def placed(self, sharding: Any, index: int) -> Any:
        """The sharding of a factor where the kernel is to have one."""
        return factor_sharding(sharding, self.source, self.axes, self.first, index)

    def each(self, change: Callable[[jax.Array, int], jax.Array]) -> Pair:
        """Both factors, changed by a function of a factor and of its number."""
        assert self.factors is not None
        one, two = self.factors
        return change(one, 0), change(two, 1)

    def runs(self, reading: Reading) -> bool:
        """Whether an equation can run what stands for the kernel."""
        if self.factors is None:
            return not reading.reason
        return reading.order(self.axes, self.first, self.groups) is not None

    @property
    def whole(self) -> jax.Array:
        """The dense kernel as the program has it here."""
        assert self.value is not None, f"{self.source.path}: the program needs its product"
        return self.value

    def with_value(self) -> "Kernel":
        """Both the factors and their product."""
        assert self.factors is not None
        return dataclasses.replace(self, value=merge(*self.factors, self.axes))


def dense(value: Any) -> Any:
    """The array that stands for a value of a program."""
    return value.whole if isinstance(value, Kernel) else value


def sources_of(values: Sequence[Any]) -> list[Source | None]:
    """For each value of a program the kernel that it is, or None."""
    return [value.source if isinstance(value, Kernel) else None for value in values]


def follow_each(eqn: Any, values: list, bind: Bind) -> list:
    """The results of an equation that gives each of its operands, such as a barrier."""
    if eqn.primitive.name == "optimization_barrier":
        return list(jax.lax.optimization_barrier(values))
    rows = zip(*eqn.params.values(), strict=True)
    options = [dict(zip(eqn.params, row, strict=True)) for row in rows]
    return [_put(eqn, *row, bind) for row in zip(values, options, strict=True)]


def _put(eqn: Any, value: Any, options: dict[str, Any], bind: Bind) -> Any:
    """One operand of an equation that puts each of them on a device."""

    def put(x: jax.Array, device: Any) -> jax.Array:
        params = {name: (given,) for name, given in options.items()}
        return bind(eqn, [x], params | {"devices": (device,)})[0]

    device = options["devices"]
    if not isinstance(value, Kernel):
        return put(value, device)
    own = None if value.value is None else put(value.value, device)
    factors = value.factors and value.each(lambda x, i: put(x, value.placed(device, i)))
    return dataclasses.replace(value, value=own, factors=factors)


def follow(eqn: Any, values: list, bind: Bind) -> Kernel | None:
    """The kernel that an equation gives which only moves the entries of one."""
    kernel = values[0] if values and isinstance(values[0], Kernel) else None
    source = moved(eqn, kernel.source) if kernel else None
    if kernel is None or source is None or any(isinstance(x, Kernel) for x in values[1:]):
        return None
    value = None if kernel.value is None else bind(eqn, [kernel.value, *values[1:]])[0]
    factors = None if kernel.factors is None else _moved_factors(eqn, kernel, source, bind)
    return dataclasses.replace(kernel, source=source, value=value, factors=factors)


def _moved_factors(eqn: Any, kernel: Kernel, source: Source, bind: Bind) -> Pair | None:
    """What an equation makes of the factors; None where it takes one channel out."""
    operation, pair = eqn.primitive.name, kernel.factors
    assert pair is not None
    if operation in ("sharding_constraint", "reshard"):
        name = "dst_sharding" if operation == "reshard" else "sharding"
        change = jax.sharding.reshard if operation == "reshard" else with_sharding_constraint
        return kernel.each(lambda x, i: change(x, kernel.placed(eqn.params[name], i)))
    if operation in UNALTERED:
        one, two = (bind(eqn, [factor])[0] for factor in pair)
        return one, two
    for axis, index in source.gone[len(kernel.source.gone) :]:
        letter = stored_letters(source, kernel.axes)[axis]
        if letter in "IO" or index is None:
            return None
        pair = _entries(kernel, axis, letter, index)
        kernel = dataclasses.replace(kernel, source=_without(kernel.source, axis), factors=pair)
    return pair


def _entries(kernel: Kernel, axis: int, letter: str, index: int) -> Pair:
    """One entry along an axis of both factors, or the only one where a factor lacks the axis."""
    place = kernel.source.kept().index(axis)

    def entry(factor: jax.Array, number: int) -> jax.Array:
        own = index if letter in kernel.shared(number) else 0
        return jax.lax.index_in_dim(factor, own, place, keepdims=False)

    return kernel.each(entry)


def _without(source: Source, axis: int) -> Source:
    return dataclasses.replace(source, gone=(*source.gone, (axis, None)))


def unstack(kernel: Kernel) -> Kernel | None:
    """A kernel whose arrays a loop can take apart along its first axis; None if it is no stack."""
    dims = kernel.source.dims
    if not dims or len(dims[0]) != 1:
        return None
    axis, source = dims[0][0], kernel.source.entry(0, None, keep=False)
    if kernel.factors is None:
        return dataclasses.replace(kernel, source=source)
    if axis >= len(kernel.source.shape) - len(kernel.axes):
        return None
    place = kernel.source.kept().index(axis)

    def leading(factor: jax.Array, _: int) -> jax.Array:
        moved = jnp.moveaxis(factor, place, 0)
        return moved[::-1] if axis in kernel.source.flips else moved

    return dataclasses.replace(kernel, source=source, factors=kernel.each(leading))
