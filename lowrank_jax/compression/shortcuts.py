"""What is added to a layer's outputs: the other branch of a residual block.

The sum of both branches is what the next layers see. So the last layer of a branch is fitted to
make up for what the other branch lacks, too.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.compression.outline import Outline
from lowrank_jax.compression.scales import along, evaluate
from lowrank_jax.compression.segments import Live
from lowrank_jax.program.channels import SCALES, Step

SMALLEST = 1e-3  # of the largest scale of a layer's channels; below, a channel has no say


@dataclasses.dataclass(frozen=True, eq=False)
class Shortcut:
    """The value that a layer's outputs are added to.

    Attributes:
        other: number of the variable.
        scale: of each of the layer's outputs before the sum, along its axis of the channels; zero
            where a channel is to be left alone.
    """

    other: int
    scale: np.ndarray

    def wanted(self, live: Live, outputs: jax.Array) -> jax.Array:
        """The outputs of the dense layer, and what the other branch lacks beside its own."""
        if self.other not in live.small:
            return outputs
        wide = jnp.promote_types(outputs.dtype, jnp.float32)
        dense, small = (jnp.asarray(x[self.other]).astype(wide) for x in (live.dense, live.small))
        inverse = np.where(self.scale == 0, 0, 1 / np.where(self.scale == 0, 1, self.scale))
        return outputs.astype(wide) + (dense - small) * inverse.astype(np.float32)


def find_shortcuts(
    outline: Outline, places: Iterable[int], values: Sequence[jax.Array]
) -> dict[int, Shortcut]:
    """The shortcuts beside the layers at some equations.

    Args:
        outline: of the program.
        places: of the equations.
        values: of the program's inputs in the dense network.
    """
    chains = {place: chain for place in places if (chain := _chain(outline, place))}
    wanted = [step.by for steps, _, _ in chains.values() for step in steps]
    known = iter(evaluate(outline.flat, outline.channels, wanted, values))
    found = {}
    for place, (steps, other, axis) in chains.items():
        scale = np.ones(outline.eqns[place].outvars[0].aval.shape[axis])
        for step in steps:
            by = along(next(known), step.axis)
            scale = scale * by if step.name == "mul" else scale / np.where(by == 0, 1, by)
        found[place] = Shortcut(other, _placed(scale, axis, outline, place))
    return found


def _chain(outline: Outline, place: int) -> tuple[list[Step], int, int] | None:
    """The scales between a layer and a sum, the other value of the sum, the layer's channels."""
    axis, result = outline.readings[place].channel_axis, outline.eqns[place].outvars[0]
    if axis is None:
        return None
    steps, end, same = outline.channels.follow(result, axis)
    other = outline.channels.sum_of(end) if same else None
    if other is None:
        return None
    return [step for step in steps if step.name in SCALES], outline.number(other), axis


def trimmed(scale: np.ndarray) -> np.ndarray:
    """A scale of each channel, with zero where a channel has no say."""
    kept = np.abs(scale) >= SMALLEST * np.abs(scale).max(initial=0)
    return np.where(kept & np.isfinite(scale), scale, 0)


def _placed(scale: np.ndarray, axis: int, outline: Outline, place: int) -> np.ndarray:
    shape = [1] * outline.eqns[place].outvars[0].aval.ndim
    shape[axis] = len(scale)
    return trimmed(scale).reshape(shape)
