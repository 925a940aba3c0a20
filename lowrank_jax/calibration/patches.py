"""Second moments of what a convolution reads, summed on the device: patches x and outputs y."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.program.reading import Reading

CHUNK = 64  # images whose positions lie on one grid
POSITIONS = 64  # of each image; neighbours tell nearly the same, and the cost is proportional

Sums = dict[str, jax.Array]


def patch_sums(reading: Reading, x: jax.Array, y: jax.Array, positions: int = POSITIONS) -> Sums:
    """Sums over patches of the inputs and over outputs, for each kernel and each of its groups.

    The positions lie on a grid, which is another one for each `CHUNK` of images.

    Args:
        reading: of the convolution; its layout is known.
        x: inputs, as the convolution reads them.
        y: outputs that it is to give, as it gives them.
        positions: about how many positions of each image are taken.

    Returns:
        count (S,), x (S, g, p), y (S, g, m), xx (S, g, p, p), xy (S, g, p, m), yy (S, g, m) in
        float32 or wider: S kernels that run at once, g groups, p entries of a patch in the stored
        order of the kernel's axes without the outputs, m outputs of a group.
    """
    inputs, outputs = _padded(reading, x), _channels_last(y, _spec(reading).out_spec)
    grid = _Grid(outputs.shape[1:-1], positions)
    total: Sums = {}
    for turn, start in enumerate(range(0, len(inputs), CHUNK)):
        chunk = slice(start, start + CHUNK)
        offset = grid.offset(turn)
        patches = _patches(reading, inputs[chunk], grid, offset)
        wanted = grid.window(outputs[chunk], offset, [1] * len(offset))
        sums = _products(reading, patches, wanted)
        total = {name: total[name] + sums[name] for name in sums} if total else sums
    return total


def _spec(reading: Reading) -> Any:
    return reading.eqn.params["dimension_numbers"]


def _channels_last(x: jax.Array, spec: Sequence[int]) -> jax.Array:
    batch, channels, *spatial = spec
    return x.transpose(batch, *spatial, channels)


def _padded(reading: Reading, x: jax.Array) -> jax.Array:
    """Inputs (batch, *spatial, channels) with their padding and dilation written out."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    inputs = _channels_last(x, _spec(reading).lhs_spec).astype(wide)
    pads = zip(reading.eqn.params["padding"], reading.eqn.params["lhs_dilation"], strict=True)
    spatial = [(before, after, dilation - 1) for (before, after), dilation in pads]
    return jax.lax.pad(inputs, jnp.zeros((), wide), [(0, 0, 0), *spatial, (0, 0, 0)])


class _Grid:
    """Every step-th output position along each axis."""

    def __init__(self, extent: Sequence[int], positions: int) -> None:
        self.extent = tuple(extent)
        share = math.prod(extent) / max(positions, 1)
        self.step = max(1, min(round(share ** (1 / len(extent))), *extent))

    def offset(self, turn: int) -> list[int]:
        """Where the grid of a chunk starts."""
        return [(5 * turn // self.step**axis) % self.step for axis in range(len(self.extent))]

    def window(self, x: jax.Array, start: Sequence[int], strides: Sequence[int]) -> jax.Array:
        """The entries of (batch, *spatial, channels) that the positions read at one tap."""
        counts = [max(1, size // self.step) for size in self.extent]
        steps = [self.step * stride for stride in strides]
        ends = [a + s * (n - 1) + 1 for a, s, n in zip(start, steps, counts, strict=True)]
        whole = (slice(None),)
        return x[whole + tuple(map(slice, start, ends, steps)) + whole]


def _patches(reading: Reading, x: jax.Array, grid: _Grid, offset: list[int]) -> jax.Array:
    """Patches (rows, groups, p)."""
    params, groups = reading.eqn.params, reading.eqn.params["feature_group_count"]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    taps = []
    for tap in _taps(reading):
        start = [t * d + s * o for t, d, s, o in zip(tap, dilation, strides, offset, strict=True)]
        part = grid.window(x, start, strides)
        taps.append(part.reshape(-1, groups, part.shape[-1] // groups))
    return _stored_order(reading, jnp.stack(taps, 2))


def _sizes(reading: Reading) -> dict[str, int]:
    shape = reading.eqn.invars[1].aval.shape
    return {letter: shape[axis] for axis, letter in reading.letters.items()}


def _taps(reading: Reading) -> Iterator[tuple[int, ...]]:
    sizes = _sizes(reading)
    spatial = [reading.letters[axis] for axis in _spec(reading).rhs_spec[2:]]
    return np.ndindex(*(sizes[letter] for letter in spatial))


def _stored_order(reading: Reading, patches: jax.Array) -> jax.Array:
    """Patches (rows, groups, taps, channels) with the kernel's stored axes, flattened."""
    sizes, layout = _sizes(reading), reading.layout
    read = [reading.letters[axis] for axis in _spec(reading).rhs_spec[2:]] + ["I"]
    rows, groups = patches.shape[:2]
    spread = patches.reshape(rows, groups, *(sizes[letter] for letter in read))
    stored = [letter for letter in layout.axes if letter != "O"]
    moved = spread.transpose(0, 1, *(2 + read.index(letter) for letter in stored))
    backward = [2 + stored.index(letter) for letter in _flipped(reading) if letter != "O"]
    return jnp.flip(moved, backward).reshape(rows, groups, -1)


def _flipped(reading: Reading) -> list[str]:
    flips = reading.source.flips if reading.source else ()
    return [letter for letter, axis in reading.layout.places if axis in flips]


def _products(reading: Reading, x: jax.Array, outputs: jax.Array) -> Sums:
    """The sums of one chunk."""
    stack, groups = reading.stack, reading.groups
    rows = len(x)
    y = outputs.astype(x.dtype).reshape(rows, stack, groups, -1)
    y = jnp.flip(y, 3) if "O" in _flipped(reading) else y
    x = x.reshape(rows, 1 if reading.shared else stack, groups, -1)
    high = {"precision": jax.lax.Precision.HIGHEST}
    xx = jnp.einsum("rsgp,rsgq->sgpq", x, x, **high)
    every = jnp.broadcast_to(x, (rows, stack, *x.shape[2:]))
    xy = jnp.einsum("rsgp,rsgm->sgpm", every, y, **high)
    xs = jnp.broadcast_to(x.sum(0), (stack, *x.shape[2:]))
    xx = jnp.broadcast_to(xx, (stack, *xx.shape[1:]))
    count = jnp.full(stack, rows, x.dtype)
    return {"count": count, "x": xs, "y": y.sum(0), "xx": xx, "xy": xy, "yy": (y * y).sum(0)}
