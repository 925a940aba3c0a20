"""What a program does to the channels of a layer's output: shifts and scales by parameters."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from jax.extend.core import Literal

RESHAPES = ("reshape", "squeeze", "expand_dims")
SHIFTS, SCALES = ("add", "sub"), ("mul", "div")
_KEPT = ("convert_element_type", "copy", "stop_gradient", "name", "sharding_constraint")
_SPREAD = ("broadcast_in_dim", "transpose", *RESHAPES, *_KEPT)


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation channel by channel on a value that depends on the inputs.

    Attributes:
        eqn: the equation.
        index: of the value among the operands.
        by: the other operand, which does not depend on the inputs.
        axis: of the channels.
    """

    eqn: Any
    index: int
    by: Any
    axis: int

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


def moved_axis(eqn: Any, axis: int) -> int:
    """Where an operation that moves values alone puts an axis; -1 if it does something else.

    The axis keeps its size, and so has one place alone in the new shape unless the size is one.
    """
    name, shape = eqn.primitive.name, eqn.invars[0].aval.shape if eqn.invars else ()
    if name in _KEPT:
        return axis
    if name == "transpose":
        return list(eqn.params["permutation"]).index(axis)
    new, before = eqn.outvars[0].aval.shape, math.prod(shape[:axis])
    if name == "broadcast_in_dim" and math.prod(new) == math.prod(shape):  # adds axes of size one
        return eqn.params["broadcast_dimensions"][axis]
    if name not in RESHAPES:
        return -1
    places = [i for i, n in enumerate(new) if n == shape[axis] and math.prod(new[:i]) == before]
    return places[0] if len(places) == 1 else -1


class Channels:
    """Reads a flat program.

    Attributes:
        made: variable to the equation that gives it.
        fixed: the variables that do not depend on the inputs.
    """

    def __init__(self, jaxpr: Any, fixed: Sequence[Any]) -> None:
        self.made: dict[Any, Any] = {}
        self.fixed = {*fixed, *jaxpr.constvars}
        self._readers: dict[Any, list] = defaultdict(list)
        for eqn in jaxpr.eqns:
            own = [var for var in eqn.invars if not isinstance(var, Literal)]
            for var in own:
                self._readers[var].append(eqn)
            if all(var in self.fixed for var in own):
                self.fixed.update(eqn.outvars)
            self.made.update(dict.fromkeys(eqn.outvars, eqn))
        for var in jaxpr.outvars:
            if not isinstance(var, Literal):
                self._readers[var].append(None)

    def is_fixed(self, var: Any) -> bool:
        return isinstance(var, Literal) or var in self.fixed

    def step(self, eqn: Any) -> Step | None:
        """What an equation does to the channels; None if it does something else."""
        name = eqn.primitive.name
        if name not in (*SHIFTS, *SCALES) or len(eqn.invars) != 2:
            return None
        data = [index for index, var in enumerate(eqn.invars) if not self.is_fixed(var)]
        if len(data) != 1 or (data[0] == 1 and name in ("sub", "div")):
            return None
        by, out = eqn.invars[1 - data[0]], eqn.outvars[0].aval
        axis = self.varies(by, out.ndim)
        return None if axis is None else Step(eqn, data[0], by, axis)

    def varies(self, var: Any, ndim: int) -> int | None:
        """The one axis along which a value differs; -1 for one number, None for more axes."""
        if isinstance(var, Literal) or not var.aval.ndim:
            return -1
        eqn = self.made.get(var)
        if eqn is not None and eqn.primitive.name == "broadcast_in_dim":
            places, shape = eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape
            axes = [place for place, size in zip(places, shape, strict=True) if size > 1]
        else:
            axes = [axis for axis, size in enumerate(var.aval.shape) if size > 1]
        if var.aval.ndim != ndim or len(axes) > 1:
            return None
        return axes[0] if axes else -1

    def after(self, var: Any, axis: int) -> list[Step]:
        """The shifts and scales along one axis that follow a value which nothing else reads."""
        return self.follow(var, axis)[0]

    def follow(self, var: Any, axis: int) -> tuple[list[Step], Any, bool]:
        """The steps of `after`, the value after them, and whether that has the first value's
        axes."""
        steps: list[Step] = []
        same = True
        while len(self._readers[var]) == 1 and self._readers[var][0] is not None:
            eqn = self._readers[var][0]
            step = self.step(eqn)
            if step is not None and step.axis in (axis, -1):
                steps.append(step)
            elif (axis := moved_axis(eqn, axis)) < 0:
                break
            elif eqn.primitive.name not in _KEPT:
                same = False
            var = eqn.outvars[0]
        return steps, var, same

    def sum_of(self, var: Any) -> Any:
        """The value that is added to another one which nothing else reads; None if none is."""
        readers = self._readers[var]
        if len(readers) != 1 or readers[0] is None or readers[0].primitive.name != "add":
            return None
        one, two = readers[0].invars
        other = two if one is var else one
        alike = getattr(other.aval, "shape", None) == var.aval.shape
        return None if self.is_fixed(other) or not alike else other

    def leaf(self, var: Any) -> Any:
        """The input of the program of which a value is a copy, spread out; None if it is none."""
        while not isinstance(var, Literal) and var in self.made:
            eqn = self.made[var]
            if eqn.primitive.name not in _SPREAD:
                return None
            var = eqn.invars[0]
        return None if isinstance(var, Literal) else var

    def readers(self, var: Any) -> list:
        """The equations that read a value; None where the program returns it."""
        return self._readers[var]

    def count_readers(self, var: Any) -> int:
        """How many equations read an input, directly or through copies of it."""
        count = 0
        for eqn in self._readers[var]:
            spread = eqn is not None and eqn.primitive.name in _SPREAD
            count += self.count_readers(eqn.outvars[0]) if spread else 1
        return count
