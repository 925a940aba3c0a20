"""What becomes of the axes of feature maps on the way to a dense layer: the order of its inputs."""

import dataclasses
import math
from typing import Any

SAME_ORDER = ("convert_element_type", "copy", "squeeze", "expand_dims", "broadcast_in_dim")
MIXED = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "rev", "gather", "pad")


@dataclasses.dataclass(frozen=True)
class Map:
    """An array whose last axes are spatial, and then the channels.

    Attributes:
        ndim: how many axes these are.
    """

    ndim: int


@dataclasses.dataclass(frozen=True)
class Flat:
    """An array along whose last axis maps were flattened, one after the other.

    Attributes:
        parts: the shape (*spatial, channels) of each map, or (features,) of what was no map.
    """

    parts: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Of the last axis."""
        return sum(map(math.prod, self.parts))


@dataclasses.dataclass(frozen=True)
class Moved:
    """An array whose axes were put into another order, on purpose, before they were flattened."""


@dataclasses.dataclass(frozen=True)
class Lost:
    """Flattened features in an order that is not followed.

    Attributes:
        reason: the operation.
    """

    reason: str


State = Map | Flat | Moved | Lost | None


def after(eqn: Any, states: list[State]) -> State:
    """The state of an operation's result, from the states of what the operation reads."""
    name, out = eqn.primitive.name, eqn.outvars[0].aval.shape
    if name in ("conv_general_dilated", "dot_general"):
        return _convolved(eqn) if name == "conv_general_dilated" else None
    if name == "transpose":
        return _transposed(eqn, states[0])
    if name == "reshape":
        return _reshaped(eqn.invars[0].aval.shape, out, states[0])
    if name == "concatenate":
        return _concatenated(eqn, states)
    known = [(s, v.aval.shape) for s, v in zip(states, eqn.invars, strict=True) if s is not None]
    if not known:
        return None
    state, shape = known[0]
    if isinstance(state, Moved | Lost):
        return state
    return _kept(name, state, shape, out)


def _kept(name: str, state: Map | Flat, shape: tuple, out: tuple) -> State:
    """The state after an operation that is none of those above."""
    if isinstance(state, Map):  # pooling changes the spatial axes, and a sum over them ends the map
        return state if len(out) == len(shape) and out[-1:] == shape[-1:] else None
    if name in MIXED:
        return Lost(name)
    if out[-1:] == shape[-1:]:
        return state
    reduced = name.startswith(("reduce", "arg")) or not out
    return None if reduced else Lost(name)


def _convolved(eqn: Any) -> State:
    spec, ndim = eqn.params["dimension_numbers"].out_spec, len(eqn.outvars[0].aval.shape)
    last = spec[1] == ndim - 1 and list(spec[2:]) == list(range(1, ndim - 1))
    return Map(ndim - 1) if last else Moved()


def _transposed(eqn: Any, state: State) -> State:
    order, ndim = list(eqn.params["permutation"]), len(eqn.params["permutation"])
    if isinstance(state, Flat):
        return state if order[-1] == ndim - 1 else Lost("transpose")
    if not isinstance(state, Map):
        return state or Moved()
    first = ndim - state.ndim
    if order == [*range(first), ndim - 1, *range(first, ndim - 1)]:
        return Moved()  # channels first, as PyTorch has them
    return state if order[first:] == list(range(first, ndim)) else Lost("transpose")


def _reshaped(before: tuple, out: tuple, state: State) -> State:
    if isinstance(state, Lost):
        return state
    if isinstance(state, Moved):
        return state if len(out) > 2 else None
    if isinstance(state, Flat):
        return state if out[-1:] == before[-1:] else Lost("reshape")
    if isinstance(state, Map):
        own = before[len(before) - state.ndim :]
        if out[len(out) - state.ndim :] == own:
            return state
        return Flat((own,)) if out[-1:] == (math.prod(own),) else None
    return _flattened(before, out)


def _flattened(before: tuple, out: tuple) -> State:
    """What is not known to be a map is one where a reshape keeps the batch alone."""
    for start in (1, 0):
        if len(before) - start > 1 and out == (*before[:start], math.prod(before[start:])):
            return Flat((before[start:],))
    return None


def _concatenated(eqn: Any, states: list[State]) -> State:
    found = [state for state in states if state is not None]
    if not found:
        return None
    if lost := [state for state in found if isinstance(state, Lost)]:
        return lost[0]
    last = eqn.params["dimension"] == len(eqn.outvars[0].aval.shape) - 1
    if any(isinstance(state, Flat) for state in found):
        if not last:
            return found[0] if len(set(states)) == 1 else Lost("concatenate")
        parts = [_parts(state, var) for state, var in zip(states, eqn.invars, strict=True)]
        return Flat(tuple(part for own in parts for part in own))
    return found[0] if len(set(states)) == 1 else None


def _parts(state: State, var: Any) -> tuple[tuple[int, ...], ...]:
    return state.parts if isinstance(state, Flat) else ((var.aval.shape[-1],),)
