"""A kernel as a value of a program that runs: its numbers, or factors in their place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.factorization.separable import merge
from lowrank_jax.program.provenance import Source, moved

Pair = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """A parameter on its way through a program.

    Attributes:
        source: which parameter it is, and what was done to its axes.
        axes: layout of the factors; "" where there are none.
        first: which convolution comes first, "vertical" or "horizontal".
        value: the dense kernel as the program has it here; None where only factors run.
        factors: both as they are stored, without the axes that are gone; what moves axes is noted
            in the source alone.
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
        sizes = [
            dict(zip(reversed(self.axes), reversed(x.shape), strict=False)) for x in self.factors
        ]
        return sizes[0]["O"] // sizes[1]["I"]

    def with_value(self) -> "Kernel":
        """Both the factors and their product."""
        assert self.factors is not None
        return dataclasses.replace(self, value=merge(*self.factors, self.axes))


def dense(value: Any) -> Any:
    """The array that stands for a value of a program."""
    if not isinstance(value, Kernel):
        return value
    assert value.value is not None, f"{value.source.path}: the program needs its product"
    return value.value


def follow(eqn: Any, values: list, bind: Any) -> Kernel | None:
    """The kernel that an equation gives which only moves the entries of one."""
    kernel = values[0] if values and isinstance(values[0], Kernel) else None
    source = moved(eqn, kernel.source) if kernel else None
    if kernel is None or source is None or any(isinstance(x, Kernel) for x in values[1:]):
        return None
    value = None if kernel.value is None else bind(eqn, [kernel.value, *values[1:]])[0]
    factors = None if kernel.factors is None else _moved_factors(eqn, kernel, source)
    return dataclasses.replace(kernel, source=source, value=value, factors=factors)


def _moved_factors(eqn: Any, kernel: Kernel, source: Source) -> Pair:
    operation, pair = eqn.primitive.name, kernel.factors
    assert pair is not None
    if operation == "convert_element_type":
        dtype = eqn.params["new_dtype"]
        return pair[0].astype(dtype), pair[1].astype(dtype)
    if operation == "stop_gradient":
        return jax.lax.stop_gradient(pair)
    if operation in ("name", "pvary"):  # remat's policies read the names
        one, two = (eqn.primitive.bind(factor, **eqn.params) for factor in pair)
        return one, two
    for axis, index in source.gone[len(kernel.source.gone) :]:
        assert index is not None
        place = kernel.source.kept().index(axis)
        one, two = (jax.lax.index_in_dim(x, index, place, keepdims=False) for x in pair)
        pair = one, two
        kernel = dataclasses.replace(kernel, source=_without(kernel.source, axis))
    return pair


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
    one, two = (jnp.moveaxis(factor, place, 0) for factor in kernel.factors)
    return dataclasses.replace(kernel, source=source, factors=(one, two))
