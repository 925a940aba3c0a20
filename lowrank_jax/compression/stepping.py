"""Gradient steps on the layers of a few blocks, towards the dense network's outputs of the last.

No label is needed. The objective is that of BRECQ (Li et al., 2021, arXiv 2102.05426), whose blocks
have quantised kernels where these have factors, and are trained one at a time.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from lowrank_jax.calibration.inputs import Inputs, images
from lowrank_jax.calibration.network import Network
from lowrank_jax.compression.descent import Descent, Loss, descend
from lowrank_jax.compression.kernels import Parts, Slice
from lowrank_jax.compression.segments import Values
from lowrank_jax.factorization.factors import wide
from lowrank_jax.program.derivatives import NO_DERIVATIVE, what_is_lacking
from lowrank_jax.tree.warning import warn

BATCH = 64  # images of a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """What the steps change.

    Attributes:
        factors: layer path and index in its stack to the factors of a kernel.
        shifts: number of a parameter that matches means to its value.
    """

    factors: dict[str, dict[Slice, Parts]]
    shifts: Values


def cut(network: Network, batches: Sequence[tuple]) -> list[tuple]:
    """Batches of few images each, or those given where the network does not run on few."""
    pieces: list[tuple] = []
    for batch in batches:
        pieces.extend(Inputs(batch, BATCH) if images(batch) > BATCH else [batch])
    try:
        network.program(pieces[0])
    except ValueError:
        return list(batches)
    return pieces


def block_error(dense: Mapping[int, jax.Array], small: Mapping[int, jax.Array]) -> jax.Array:
    """The squared error of values, relative to their variance in the dense network."""
    error = jnp.float32(0)
    for number, value in small.items():
        if jnp.issubdtype(value.dtype, jnp.floating):
            wanted = wide(dense[number])
            squares = jnp.mean((wide(value) - wanted) ** 2)
            error += squares / jnp.maximum(jnp.var(wanted), jnp.finfo(wanted.dtype).tiny)
    return error


def stepped(
    loss: Loss[Trained], start: Trained, batches: Sequence[tuple], steps: int
) -> Descent[Trained] | None:
    """The steps of a few blocks; None where they cannot have any."""
    if len(batches) < 2 or not (start.factors or start.shifts):
        return None
    try:
        return descend(loss, start, batches, steps)
    except NO_DERIVATIVE as error:
        layers = ", ".join(start.factors)
        warn(
            f"{layers}: no gradient steps, because the block has no derivative; the closed form "
            f"stays: {what_is_lacking(error)}"
        )
        return None
