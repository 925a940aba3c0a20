"""What a convolution reads and gives, as rows: patches of its inputs, and outputs."""

import dataclasses
import math
from collections.abc import Sequence
from math import gcd

import jax
import jax.numpy as jnp

from lowrank_jax.program.reading import Reading

SAMPLES = 2048  # of a batch, at least, where its images have so many
SPREAD = 0.618  # of the starts of a grid lie between two images: all are met, in any number evenly

Ints = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How a convolution cuts its inputs into patches, as plain numbers.

    Attributes:
        sizes: taps along each spatial axis of the program.
        strides, padding, dilation, input_dilation: of the convolution.
        inputs, outputs: axes of (batch, *spatial, channels) in the program's arrays.
        stack: how many kernels run at once.
        shared: whether all of them, and all groups, read the same channels.
        groups: of each kernel.
        stored: order of (*spatial, input channels) in the stored kernel.
        flips: which of (*spatial, input channels, outputs) run backwards.
    """

    sizes: Ints
    strides: Ints
    padding: tuple[tuple[int, int], ...]
    dilation: Ints
    input_dilation: Ints
    inputs: Ints
    outputs: Ints
    stack: int
    shared: bool
    groups: int
    stored: Ints
    flips: Ints

    @classmethod
    def of(cls, reading: Reading) -> "Geometry":
        """The geometry of a reading whose layout is known."""
        params, spec = reading.eqn.params, reading.eqn.params["dimension_numbers"]
        read = [reading.letters[axis] for axis in spec.rhs_spec[2:]] + ["I"]
        shape = reading.eqn.invars[1].aval.shape
        backward = reading.source.flips if reading.source else frozenset()
        places = dict(reading.layout.places)
        return cls(
            sizes=tuple(shape[axis] for axis in spec.rhs_spec[2:]),
            strides=tuple(params["window_strides"]),
            padding=tuple(map(tuple, params["padding"])),
            dilation=tuple(params["rhs_dilation"]),
            input_dilation=tuple(params["lhs_dilation"]),
            inputs=(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]),
            outputs=(spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1]),
            stack=reading.stack,
            shared=reading.shared,
            groups=reading.groups,
            stored=tuple(read.index(letter) for letter in reading.layout.axes if letter != "O"),
            flips=tuple(i for i, x in enumerate([*read, "O"]) if places[x] in backward),
        )

    @property
    def all_groups(self) -> int:
        """Groups of channels that are read apart."""
        return 1 if self.shared else self.stack * self.groups

    @property
    def axes(self) -> tuple[int, int]:
        """The axis of the batch of the inputs, and that of the channels of the outputs."""
        return self.inputs[0], self.outputs[-1]

    def rows(
        self, x: jax.Array, y: jax.Array, turn: jax.Array | int, positions: int
    ) -> tuple[jax.Array, jax.Array]:
        """Patches and outputs at a few positions of each image, as `patch_sums` wants them."""
        inputs, outputs = _padded(self, x), y.transpose(self.outputs)
        grids = _grids(outputs.shape, turn, positions)
        patches, taken = _patches(self, inputs, grids), _taken(outputs, grids)
        stack = 1 if self.shared else self.stack
        return patches.reshape(len(patches), stack, self.groups, -1), self._grouped(taken)

    def outputs_of(self, y: jax.Array) -> jax.Array:
        """All outputs as rows (rows, S, g, m)."""
        return self._grouped(y.transpose(self.outputs))

    def _grouped(self, y: jax.Array) -> jax.Array:
        own = y.reshape(-1, self.stack, self.groups, y.shape[-1] // self.stack // self.groups)
        return jnp.flip(own, 3) if len(self.sizes) + 1 in self.flips else own


def _grids(shape: Ints, turn: jax.Array | int, positions: int) -> list[jax.Array]:
    """Along each axis the output positions (batch, n) that are taken of each image.

    They are a grid whose start differs from image to image, so that borders count as often as they
    occur.
    """
    batch, *extent, _ = shape
    step = _step(shape, positions)
    starts = step ** len(extent)
    jump = next(n for n in range(max(1, round(SPREAD * starts)), 2 * starts) if gcd(n, step) == 1)
    image = (jnp.asarray(turn, jnp.int32) * batch + jnp.arange(batch)) % starts
    start = image * jump % starts
    return [
        (start // step**axis % step)[:, None] + step * jnp.arange(size // step)
        for axis, size in enumerate(extent)
    ]


def _step(shape: Sequence[int], positions: int) -> int:
    """Every how many-th output is taken; the fewer images there are, the more of each."""
    batch, *extent, _ = shape
    wanted = max(positions, SAMPLES // batch)
    share = max(1.0, math.prod(extent) / wanted)
    return max(1, min(round(share ** (1 / len(extent))), *extent))


def _padded(geometry: Geometry, x: jax.Array) -> jax.Array:
    """Inputs (batch, *spatial, channels) with their padding and dilation written out."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    inputs = x.transpose(geometry.inputs).astype(wide)
    pads = zip(geometry.padding, geometry.input_dilation, strict=True)
    spatial = [(before, after, dilation - 1) for (before, after), dilation in pads]
    return jax.lax.pad(inputs, jnp.zeros((), wide), [(0, 0, 0), *spatial, (0, 0, 0)])


def _taken(x: jax.Array, places: Sequence[jax.Array]) -> jax.Array:
    """Entries (batch, *n, channels) of (batch, *spatial, channels) at places (batch, n) an axis."""

    def of_image(image: jax.Array, *own: jax.Array) -> jax.Array:
        return image[jnp.ix_(*own)]

    return jax.vmap(of_image)(x, *places)


def _patches(geometry: Geometry, x: jax.Array, grids: Sequence[jax.Array]) -> jax.Array:
    """Patches (rows, groups, p) at a grid of output positions of each image."""
    axes = zip(grids, geometry.strides, geometry.dilation, geometry.sizes, strict=True)
    places = [
        (stride * own[:, :, None] + dilation * jnp.arange(size)).reshape(len(own), -1)
        for own, stride, dilation, size in axes
    ]
    split = [
        n for own, size in zip(grids, geometry.sizes, strict=True) for n in (own.shape[1], size)
    ]
    spatial = len(grids)
    spread = _taken(x, places).reshape(len(x), *split, geometry.all_groups, -1)
    rows, taps = (range(start, 2 * spatial + 1, 2) for start in (1, 2))
    moved = spread.transpose(0, *rows, 2 * spatial + 1, *taps, 2 * spatial + 2)
    flat = moved.reshape(-1, geometry.all_groups, *geometry.sizes, moved.shape[-1])
    return _in_stored_order(geometry, flat)


def _in_stored_order(geometry: Geometry, patches: jax.Array) -> jax.Array:
    """Patches (rows, groups, *taps, channels) with the kernel's stored axes, flattened."""
    backward = [2 + axis for axis in geometry.flips if axis <= len(geometry.sizes)]
    moved = jnp.flip(patches, backward).transpose(0, 1, *(2 + axis for axis in geometry.stored))
    return moved.reshape(*patches.shape[:2], -1)
