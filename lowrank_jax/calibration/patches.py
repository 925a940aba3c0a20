"""Second moments of what a convolution reads, summed on the device: patches x and outputs y."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.program.reading import Reading

POSITIONS = 64  # of each image; neighbours tell nearly the same, and the cost is proportional
SAMPLES = 8192  # of a batch, at least, where its images have so many
GRIDS = 4  # in a batch; each starts elsewhere, so that borders count as often as they occur

Sums = dict[str, jax.Array]
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


def patch_sums(
    geometry: Geometry,
    x: jax.Array,
    y: jax.Array,
    turn: jax.Array | int,
    positions: int = POSITIONS,
) -> Sums:
    """Sums over patches of the inputs and over outputs, for each kernel and each of its groups.

    Args:
        geometry: of the convolution.
        x: inputs, as the convolution reads them.
        y: outputs that it is to give, as it gives them.
        turn: number of the batch; the positions lie on a grid, which starts elsewhere in each.
        positions: about how many positions of each image are taken.

    Returns:
        count (S,), x (S, g, p), y (S, g, m), xx (S, g, p, p), xy (S, g, p, m), yy (S, g, m) in
        float32 or wider: S kernels that run at once, g groups, p entries of a patch in the stored
        order of the kernel's axes without the outputs, m outputs of a group.
    """
    inputs, outputs = _padded(geometry, x), y.transpose(geometry.outputs)
    step = _step(outputs.shape, positions)
    count = math.gcd(len(inputs), GRIDS)
    parts = [a.reshape(count, -1, *a.shape[1:]) for a in (inputs, outputs)]
    turns = jnp.asarray(turn, jnp.int32) * count + jnp.arange(count)

    def part(own: tuple) -> Sums:
        return _sums_of_grid(geometry, *own, step)  # type: ignore[call-arg]

    return jax.tree.map(lambda a: a.sum(0), jax.lax.map(part, (*parts, turns)))


def _step(shape: Sequence[int], positions: int) -> int:
    """Every how many-th output is taken; the fewer images there are, the more of each."""
    batch, *extent, _ = shape
    wanted = max(positions, SAMPLES // batch)
    share = max(1.0, math.prod(extent) / wanted)
    return max(1, min(round(share ** (1 / len(extent))), *extent))


def _sums_of_grid(
    geometry: Geometry, inputs: jax.Array, outputs: jax.Array, turn: jax.Array, step: int
) -> Sums:
    extent = outputs.shape[1:-1]
    offset = [(5 * turn // step**axis) % step for axis in range(len(extent))]
    counts = [size // step for size in extent]
    patches = _patches(geometry, inputs, offset, counts, step)
    whole = _shifted(outputs, offset, [step * (n - 1) + 1 for n in counts])
    return _products(geometry, patches, _every(whole, step))


def _padded(geometry: Geometry, x: jax.Array) -> jax.Array:
    """Inputs (batch, *spatial, channels) with their padding and dilation written out."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    inputs = x.transpose(geometry.inputs).astype(wide)
    pads = zip(geometry.padding, geometry.input_dilation, strict=True)
    spatial = [(before, after, dilation - 1) for (before, after), dilation in pads]
    return jax.lax.pad(inputs, jnp.zeros((), wide), [(0, 0, 0), *spatial, (0, 0, 0)])


def _shifted(x: jax.Array, offset: Sequence, extent: Sequence[int]) -> jax.Array:
    """A window of (batch, *spatial, channels) that starts at an offset."""
    zero = jnp.int32(0)
    sizes = (x.shape[0], *extent, x.shape[-1])
    return jax.lax.dynamic_slice(x, (zero, *offset, zero), sizes)


def _every(x: jax.Array, step: int | Sequence[int]) -> jax.Array:
    steps = [step] * (x.ndim - 2) if isinstance(step, int) else step
    return x[(slice(None), *(slice(None, None, own) for own in steps), slice(None))]


def _patches(
    geometry: Geometry, x: jax.Array, offset: Sequence, counts: Sequence[int], step: int
) -> jax.Array:
    """Patches (rows, groups, p) at a grid of output positions."""
    strides, dilation = geometry.strides, geometry.dilation
    starts = [s * o for s, o in zip(strides, offset, strict=True)]
    steps = [s * step for s in strides]
    spans = [own * (n - 1) + 1 for own, n in zip(steps, counts, strict=True)]
    reach = [(k - 1) * d for k, d in zip(geometry.sizes, dilation, strict=True)]
    window = _shifted(x, starts, [span + far for span, far in zip(spans, reach, strict=True)])
    taps = []
    for tap in _taps(geometry):
        first = [t * d for t, d in zip(tap, dilation, strict=True)]
        last = [start + span for start, span in zip(first, spans, strict=True)]
        own = window[(slice(None), *map(slice, first, last, steps))]
        taps.append(own.reshape(-1, geometry.all_groups, own.shape[-1] // geometry.all_groups))
    return _in_stored_order(geometry, jnp.stack(taps, 2))


def _taps(geometry: Geometry) -> Iterator[Ints]:
    return np.ndindex(*geometry.sizes)


def _in_stored_order(geometry: Geometry, patches: jax.Array) -> jax.Array:
    """Patches (rows, groups, taps, channels) with the kernel's stored axes, flattened."""
    rows, groups, _, channels = patches.shape
    spread = patches.reshape(rows, groups, *geometry.sizes, channels)
    backward = [2 + axis for axis in geometry.flips if axis <= len(geometry.sizes)]
    moved = jnp.flip(spread, backward).transpose(0, 1, *(2 + axis for axis in geometry.stored))
    return moved.reshape(rows, groups, -1)


def _products(geometry: Geometry, x: jax.Array, outputs: jax.Array) -> Sums:
    """The sums over all rows."""
    rows, stack, groups = len(x), geometry.stack, geometry.groups
    y = outputs.astype(x.dtype).reshape(rows, stack, groups, -1)
    y = jnp.flip(y, 3) if len(geometry.sizes) + 1 in geometry.flips else y
    x = x.reshape(rows, 1 if geometry.shared else stack, groups, -1)
    high = {"precision": jax.lax.Precision.HIGHEST}
    xx = jnp.einsum("rsgp,rsgq->sgpq", x, x, **high)  # type: ignore[call-overload]
    every = jnp.broadcast_to(x, (rows, stack, *x.shape[2:]))
    return {
        "count": jnp.full(stack, rows, x.dtype),
        "x": jnp.broadcast_to(x.sum(0), (stack, *x.shape[2:])),
        "y": y.sum(0),
        "xx": jnp.broadcast_to(xx, (stack, *xx.shape[1:])),
        "xy": jnp.einsum("rsgp,rsgm->sgpm", every, y, **high),  # type: ignore[call-overload]
        "yy": (y * y).sum(0),
    }
