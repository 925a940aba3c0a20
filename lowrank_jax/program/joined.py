"""Kernels that a program joins along their outputs before it reads them, as an LSTM its gates'.

What reads them all at once gives the outputs of each, side by side. So a program that reads one
after the other, and joins what they give, is the same, and each kernel may have factors.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.program.flat import retraced
from lowrank_jax.program.interpreter import Found, Rule, bind
from lowrank_jax.program.jaxprs import opened
from lowrank_jax.program.kernel import Kernel
from lowrank_jax.program.provenance import UNALTERED, Source
from lowrank_jax.program.reading import READERS
from lowrank_jax.program.survey import Survey

JOIN = "concatenate"
PASSED = {*UNALTERED} - {"pvary", "reshard", "sharding_constraint"}  # which hold for the whole


def apart(program: Any, parameters: Sequence[bool], wanted: Sequence[bool]) -> Any:
    """The program that reads kernels one after the other which another one joins.

    Args:
        program: a jaxpr with its constants.
        parameters: for each input whether it is one.
        wanted: for each input whether it is to be read alone. The others stay joined.

    Returns:
        A jaxpr with its constants and the same inputs and outputs; the one given where no kernel
        that is wanted is joined.
    """
    own = [one or two for one, two in zip(parameters, wanted, strict=True)]
    sources = [_source(i, aval) if own[i] else None for i, aval in enumerate(program.in_avals)]
    paths = frozenset(str(i) for i, one in enumerate(wanted) if one)
    touched = Survey.of(opened(program), sources).touched
    if not any(JOIN in touched[path] for path in paths & touched.keys()):
        return program
    return retraced(program, sources, _Apart(paths))


def _source(index: int, aval: Any) -> Source | None:
    shape = getattr(aval, "shape", ())
    return Source.of(str(index), shape) if len(shape) > 1 else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Joined(Kernel):
    """Kernels that are joined, and not yet read.

    Attributes:
        parts: the kernels.
        axis: along which they are joined.
    """

    parts: tuple[Kernel, ...] = ()
    axis: int = dataclasses.field(default=0, metadata={"static": True})

    @classmethod
    def of(cls, parts: Sequence[Kernel], axis: int) -> "Joined":
        """Kernels side by side."""
        source = parts[0].source.after(JOIN)
        return cls(source, "", "vertical", None, None, tuple(parts), axis)

    @property
    def whole(self) -> jax.Array:
        return jnp.concatenate([part.whole for part in self.parts], self.axis)

    def moved(self, eqn: Any, axis: int) -> "Joined":
        """What an equation makes of each kernel, joined along an axis of the results."""
        parts = [dataclasses.replace(p, value=bind(eqn, [p.whole])[0]) for p in self.parts]
        return dataclasses.replace(self, parts=tuple(parts), axis=axis)


@dataclasses.dataclass(frozen=True)
class _Apart(Rule):
    """Joins what kernels give in place of the kernels.

    Attributes:
        wanted: paths of those that are read alone.
    """

    wanted: frozenset[str]

    def apply(self, eqn: Any, values: list) -> Found | None:
        name = eqn.primitive.name
        if name == JOIN and all(isinstance(value, Kernel) for value in values):
            return self._join(values, eqn.params["dimension"])
        kernels = [i for i, value in enumerate(values) if isinstance(value, Kernel)]
        if len(kernels) != 1 or not isinstance(values[kernels[0]], Joined):
            return None
        joined: Joined = values[kernels[0]]
        if name in PASSED:
            return [joined.moved(eqn, joined.axis)], {}
        if name == "transpose":
            return [joined.moved(eqn, eqn.params["permutation"].index(joined.axis))], {}
        return self._read(eqn, values, kernels[0]) if name in READERS else None

    def _join(self, kernels: Sequence[Kernel], axis: int) -> Found | None:
        """The kernels side by side, neighbours that are not wanted in one; None if none is."""
        kernels = [part for kernel in kernels for part in _parts(kernel, axis)]
        wanted = [kernel.source.path in self.wanted for kernel in kernels]
        if not any(wanted):
            return None
        numbers = itertools.groupby(range(len(kernels)), lambda i: wanted[i] and i + 1)
        groups = [[kernels[i] for i in group] for _, group in numbers]
        return [Joined.of([_as_one(group, axis) for group in groups], axis)], {}

    def _read(self, eqn: Any, values: list, operand: int) -> Found | None:
        """The outputs of each kernel side by side; None where they are joined along other axes."""
        joined: Joined = values[operand]
        axis = _output_axis(eqn, operand, joined.axis)
        if axis is None:
            return None
        given = [[*values[:operand], part.whole, *values[operand + 1 :]] for part in joined.parts]
        return [jnp.concatenate([bind(eqn, own)[0] for own in given], axis)], {}


def _parts(kernel: Kernel, axis: int) -> Sequence[Kernel]:
    """The kernels that were joined along the same axis before, as jnp does with more than 16."""
    return kernel.parts if isinstance(kernel, Joined) and kernel.axis == axis else [kernel]


def _as_one(kernels: Sequence[Kernel], axis: int) -> Kernel:
    if len(kernels) == 1:
        return kernels[0]
    whole = jnp.concatenate([kernel.whole for kernel in kernels], axis)
    return dataclasses.replace(kernels[0], value=whole)


def _output_axis(eqn: Any, operand: int, axis: int) -> int | None:
    """The axis of what an equation gives that an axis of its kernel becomes."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "conv_general_dilated":
        groups = {eqn.params["feature_group_count"], eqn.params["batch_group_count"]}
        outputs = operand == 1 and axis == numbers.rhs_spec[0] and groups == {1}
        return numbers.out_spec[1] if outputs else None
    gone = {*numbers[0][operand], *numbers[1][operand]}
    if axis in gone:
        return None
    other = eqn.invars[0].aval.ndim - len(numbers[0][0]) if operand else len(numbers[1][0])
    return other + sum(before not in gone for before in range(axis))
