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
from lowrank_jax.compression.scales import evaluate, inverse, product_of
from lowrank_jax.compression.segments import Live
from lowrank_jax.program.channels import SCALES, Step


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
        return outputs.astype(wide) + (dense - small) * inverse(self.scale).astype(np.float32)


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
    wanted = {place: [step.by for step in steps] for place, (steps, _, _) in chains.items()}
    known, found = evaluate(outline, wanted, values), {}
    for place, (steps, other, axis) in chains.items():
        like = outline.eqns[place].outvars[0].aval
        scale = product_of(steps, known[place], like.shape[axis])
        shape = [-1 if other_axis == axis else 1 for other_axis in range(like.ndim)]
        found[place] = Shortcut(other, scale.reshape(shape))
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
