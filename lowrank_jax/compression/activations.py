"""What an activation hides: a layer is fitted again to what its errors leave behind it.

After a ReLU, errors of outputs that are negative in both networks are gone. So a layer that was
fitted to the dense outputs y is fitted again, as in Zhang et al., 2015 (arXiv 1505.06798), to its
own outputs p plus what the activation g shows of its error: p + g(y) - g(p). For a ReLU that is p
where both are negative, y where both are positive. No error grows by that, where g rises by at
most one for one.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.compression.outline import Outline
from lowrank_jax.compression.scales import along, evaluate
from lowrank_jax.compression.segments import Live, Values, both, fixed_equations
from lowrank_jax.compression.shortcuts import placed
from lowrank_jax.factorization.factors import wide
from lowrank_jax.program.channels import SCALES
from lowrank_jax.program.compiler import default_options

STRAIGHT = ("add", "sub", "mul", "div", "neg", "convert_element_type", "copy")
BENT = (
    "max", "min", "clamp", "select_n", "abs", "sign", "square", "sqrt", "rsqrt", "cbrt", "pow",
    "integer_pow", "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc",
)  # fmt: skip
COMPARED = ("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not")


@dataclasses.dataclass(frozen=True, eq=False)
class Activation:
    """The way from a layer's outputs to the result of an activation, alone or after a sum.

    Attributes:
        place: index of the layer's equation.
        axis: of the channels in its outputs.
        chain: indices of the equations of the way.
        result: number of the activation's result.
        scale: of each of the layer's outputs on the way, along the axis; zero where a channel is to
            be left alone.
    """

    place: int
    axis: int
    chain: tuple[int, ...]
    result: int
    scale: np.ndarray

    @property
    def channels(self) -> int:
        """How many channels the layer's outputs have."""
        return int(self.scale.shape[self.axis])

    def wanted(self, outline: Outline, given: Values, small: Values, live: Live, lack: Any) -> Any:
        """The outputs that the layer is to give, as far as errors are seen behind the activation.

        Args:
            outline: of the program at the batch's shapes.
            given: number of an input to its value in the dense network.
            small: the inputs that differ in the compressed network, with the layer's factors.
            live: what the batch has given.
            lack: what the layer's outputs lack on the average, which a shift adds, by channel.

        Returns:
            The outputs, and for each channel the sum of the squared errors behind the activation.
        """
        return self._program(outline)(given, small, live.dense, live.small, lack)

    @functools.lru_cache(maxsize=8)  # noqa: B019  # the activation goes with the run
    def _program(self, outline: Outline) -> Any:
        y = outline.gives(outline.eqns[self.place])[0]
        own = (self.place, *self.chain)
        fixed = fixed_equations(outline, own)
        others = tuple(i for i in range(self.scale.ndim) if i != self.axis)
        inverse = np.where(self.scale == 0, 0, 1 / np.where(self.scale == 0, 1, self.scale))

        def run(given: Values, small: Values, dense: Values, other: Values, lack: Any) -> Any:
            one, two = {**given, **dense}, {**small, **other}
            for place in (*fixed, *own):
                both(outline, place, one, two)
            hidden = wide(one[self.result]) - wide(two[self.result])
            error = hidden * inverse.astype(hidden.dtype)
            found = wide(two[y]) + lack.reshape(self.scale.shape)
            return jnp.where(self.scale == 0, wide(one[y]), found + error), (error**2).sum(others)

        return jax.jit(run, compiler_options=default_options())


def find_activations(
    outline: Outline, places: Iterable[int], values: Sequence[jax.Array]
) -> dict[int, Activation]:
    """The activations behind the layers at some equations.

    Args:
        outline: of the program.
        places: of the equations.
        values: of the program's inputs in the dense network.
    """
    ways = {place: way for place in places if (way := _way(outline, place))}
    steps = {place: _scales(outline, place, chain) for place, (chain, _) in ways.items()}
    wanted = [step.by for own in steps.values() for step in own]
    known = iter(evaluate(outline.flat, outline.channels, wanted, values))
    found = {}
    for place, (chain, result) in ways.items():
        axis = outline.readings[place].channel_axis
        assert axis is not None
        scale = np.ones(outline.eqns[place].outvars[0].aval.shape[axis])
        for step in steps[place]:
            by = along(next(known), step.axis)
            scale = scale * by if step.name == "mul" else scale / np.where(by == 0, 1, by)
        own = placed(scale, axis, outline, place)
        found[place] = Activation(place, axis, tuple(chain), result, own)
    return found


def _scales(outline: Outline, place: int, chain: Sequence[int]) -> list:
    axis = outline.readings[place].channel_axis
    assert axis is not None
    own = [outline.eqns[index] for index in chain]
    steps = outline.channels.after(outline.eqns[place].outvars[0], axis)
    return [s for s in steps if s.name in SCALES and any(s.eqn is eqn for eqn in own)]


def _way(outline: Outline, place: int) -> tuple[list[int], int] | None:
    """The equations from a layer to where its outputs, changed one by one, are in one value."""
    if outline.readings[place].channel_axis is None:
        return None
    made, last = _made(outline), outline.last_reads()
    members = {*outline.gives(outline.eqns[place])}
    shape, bent, chain = outline.eqns[place].outvars[0].aval.shape, False, list[int]()
    for index in range(place + 1, len(outline.eqns)):
        eqn = outline.eqns[index]
        if members.isdisjoint(outline.reads(eqn)):
            continue
        if not _one_by_one(outline, eqn, members, shape, made, place):
            return None
        chain.append(index)
        members.update(outline.gives(eqn))
        bent = bent or eqn.primitive.name in BENT
        ahead = [number for number in members if last.get(number, -1) > index]
        if bent and ahead == outline.gives(eqn):
            return chain, ahead[0]
    return None


def _one_by_one(
    outline: Outline,
    eqn: Any,
    members: set[int],
    shape: tuple[int, ...],
    made: Mapping[int, int],
    place: int,
) -> bool:
    """Whether an equation changes each output on its own, or adds what is known at the place."""
    name = eqn.primitive.name
    if name not in (*STRAIGHT, *BENT, *COMPARED) or eqn.outvars[0].aval.shape != shape:
        return False
    others = set(outline.reads(eqn)) - members - outline.fixed
    return not others or (name == "add" and all(made.get(n, -1) < place for n in others))


def _made(outline: Outline) -> dict[int, int]:
    """The equation that gives each variable."""
    return {n: index for index, eqn in enumerate(outline.eqns) for n in outline.gives(eqn)}
