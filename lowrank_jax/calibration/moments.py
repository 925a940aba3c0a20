"""Second moments of what a convolution sees: its input patches, and the outputs that it is to
give."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factorization.moments import Moments

CHUNK = 64  # images in one accumulation in float32; sums over chunks are in float64


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a convolution cuts patches from channels-last inputs (batch, *spatial, channels)."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls, inputs: Any, kernel: Any, strides: Any, padding: Any, dilation: Any, groups: int
    ) -> "Geometry":
        """From the arguments of ``jax.lax.conv_general_dilated`` in Flax's layout."""
        size = tuple(kernel.shape[:-2])
        dilation = tuple(dilation or (1,) * len(size))
        if isinstance(padding, str):
            reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
            padding = jax.lax.padtype_to_pads(inputs.shape[1:-1], reach, strides, padding)
        return cls(size, tuple(strides), tuple(map(tuple, padding)), dilation, groups)


def moments(
    inputs: jax.Array, outputs: jax.Array, geometry: Geometry, positions: int = 64
) -> Moments:
    """Gathers the moments of a batch, a chunk of images at a time.

    Args:
        inputs: (batch, *spatial, channels) that the convolution sees.
        outputs: (batch, *spatial', n) that it is to give.
        geometry: of the convolution.
        positions: about how many positions of each image are taken, on a grid that moves from chunk
            to chunk; neighbours tell nearly the same, and the cost is proportional.

    Raises:
        ValueError: the inputs or outputs hold NaN or infinite values.
    """
    step = max(1, round((math.prod(outputs.shape[1:-1]) / positions) ** (1 / len(geometry.size))))
    step = min(step, *outputs.shape[1:-1])
    found = None
    for turn, start in enumerate(range(0, len(inputs), CHUNK)):
        chunk = slice(start, start + CHUNK)
        offset = np.array([(5 * turn // step**axis) % step for axis in range(len(geometry.size))])
        sums = _sums(inputs[chunk], outputs[chunk], offset, geometry, step)
        part = Moments(int(sums[0]), *(np.asarray(value, np.float64) for value in sums[1:]))
        found = part if found is None else found + part
    if found is None:
        raise ValueError("No calibration data: the batch is empty.")
    if not all(np.isfinite(value).all() for value in (found.xx, found.xy)):
        raise ValueError(
            "The activations hold NaN or infinite values; check the weights and the calibration images."
        )
    return found


@functools.partial(jax.jit, static_argnums=(3, 4))
def _sums(
    inputs: jax.Array, outputs: jax.Array, offset: jax.Array, geometry: Geometry, step: int
) -> tuple:
    x = _patches(
        inputs.astype(jnp.float32), outputs.shape[1:-1], offset, geometry, step
    )  # (rows, groups, p)
    y = _window(outputs, offset, (step,) * len(geometry.size), outputs.shape[1:-1], step)
    y = y.astype(jnp.float32).reshape(x.shape[0], geometry.groups, -1)
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return (
        x.shape[0],
        x.sum(0),
        y.sum(0),
        product("rgp,rgq->gpq", x, x),
        product("rgp,rgn->gpn", x, y),
        (y * y).sum(0),
    )


def _patches(
    inputs: jax.Array, out: tuple[int, ...], offset: jax.Array, geometry: Geometry, step: int
) -> jax.Array:
    padded = jnp.pad(inputs, ((0, 0), *geometry.padding, (0, 0)))
    strides, taps = np.array(geometry.strides), []
    for tap in np.ndindex(geometry.size):
        part = _window(
            padded,
            np.array(tap) * geometry.dilation + strides * offset,
            tuple(strides * step),
            out,
            step,
        )
        taps.append(part.reshape(-1, geometry.groups, part.shape[-1] // geometry.groups))
    return jnp.concatenate(taps, -1)


def _window(
    x: jax.Array, start: Any, strides: tuple[int, ...], out: tuple[int, ...], step: int
) -> jax.Array:
    """Every stride-th entry from a start on, as many as the grid has; the start alone may be
    traced."""
    sizes = [s * (n // step - 1) + 1 for s, n in zip(strides, out, strict=True)]
    block = jax.lax.dynamic_slice(x, (0, *start, 0), (x.shape[0], *sizes, x.shape[-1]))
    return block[(slice(None), *(slice(None, None, int(s)) for s in strides))]
