"""What a matrix product reads and gives, as rows: entries that it contracts, and outputs."""

import dataclasses
from collections.abc import Sequence
from math import gcd, prod

import jax
import jax.numpy as jnp

from lowrank_jax.calibration.patches import SAMPLES
from lowrank_jax.program.reading import Reading

Ints = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Side:
    """One operand of a product, or its result, as an array of rows.

    Attributes:
        stack: its axes of the batch.
        rows: its axes that the matrix lacks.
        own: its axes that it shares with the matrix.
        sizes: of the stored axes of the matrix that these are made of.
        order: of these in the stored matrix.
    """

    stack: Ints
    rows: Ints
    own: Ints
    sizes: Ints
    order: Ints

    def flat(self, x: jax.Array) -> jax.Array:
        """The array as (rows, stack, entries in the order of the stored matrix)."""
        moved = x.transpose(*self.rows, *self.stack, *self.own)
        counts = [prod(x.shape[axis] for axis in axes) for axes in (self.rows, self.stack)]
        spread = moved.reshape(*counts, *self.sizes)
        stored = spread.transpose(0, 1, *(2 + place for place in self.order))
        return stored.reshape(*counts, -1)


@dataclasses.dataclass(frozen=True)
class ProductGeometry:
    """How a product takes its operand apart.

    Attributes:
        inputs, outputs: the other operand and the result.
        stack: how many matrices run at once.
        channels: axis of the outputs; None where a matrix has several.
    """

    inputs: Side
    outputs: Side
    stack: int
    channels: int | None

    @classmethod
    def of(cls, reading: Reading) -> "ProductGeometry":
        """The geometry of a reading whose layout is known."""
        operand, numbers = reading.operand, reading.eqn.params["dimension_numbers"]
        contracting, batch = ((dims[operand], dims[1 - operand]) for dims in numbers)
        ndims = [var.aval.ndim for var in reading.eqn.invars]
        free = [
            [axis for axis in range(n) if axis not in (*one, *two)]
            for n, one, two in zip(ndims, *numbers, strict=True)
        ]
        start = len(batch[0])
        first, second = (range(start, start + len(free[0])), range(start + len(free[0]), 64))
        places = [list(first), list(second)[: len(free[1])]]
        stacks = sorted(range(start), key=lambda axis: _first(reading, batch[0][axis]))
        return cls(
            inputs=_side(
                reading, [batch[1][i] for i in stacks], free[1 - operand], contracting[1],
                contracting[0],
            ),
            outputs=_side(reading, stacks, places[1 - operand], places[operand], free[operand]),
            stack=reading.stack,
            channels=reading.channel_axis,
        )  # fmt: skip

    @property
    def axes(self) -> tuple[Ints, int | None]:
        """The axes of the rows of the inputs, and that of the channels of the outputs."""
        return self.inputs.rows, self.channels

    def rows(
        self, x: jax.Array, y: jax.Array, turn: jax.Array | int, positions: int
    ) -> tuple[jax.Array, jax.Array]:
        """Some of the rows of both, as `patch_sums` wants them."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        inputs, outputs = self.inputs.flat(x), self.outputs.flat(y)
        images = x.shape[self.inputs.rows[0]] if self.inputs.rows else 1
        taken = _taken(len(inputs), max(SAMPLES, positions * images), images, turn)
        return inputs[taken].astype(wide)[:, :, None], outputs[taken].astype(wide)[:, :, None]

    def outputs_of(self, y: jax.Array) -> jax.Array:
        """All outputs as rows (rows, S, 1, m)."""
        return self.outputs.flat(y)[:, :, None]


def _first(reading: Reading, axis: int) -> int:
    """The stored axis that an axis of the kernel begins with."""
    dims = reading.source.dims if reading.source else None
    return (dims or ())[axis][0]


def _side(
    reading: Reading, stack: Sequence[int], rows: Sequence[int], own: Sequence[int],
    of_kernel: Sequence[int],
) -> Side:  # fmt: skip
    source = reading.source
    assert source is not None and source.dims is not None
    stored = [axis for place in of_kernel for axis in source.dims[place]]
    order = sorted(range(len(stored)), key=lambda place: stored[place])
    sizes = tuple(source.shape[axis] for axis in stored)
    return Side(tuple(stack), tuple(rows), tuple(own), sizes, tuple(order))


def _taken(count: int, wanted: int, images: int, turn: jax.Array | int) -> jax.Array:
    """The numbers of the rows that are taken; another start in each turn.

    The step and the rows of an image have no common divisor, so that all places of an image count.
    """
    step = max(1, count // wanted)
    while gcd(step, max(1, count // images)) > 1:
        step += 1
    start = jnp.asarray(turn, jnp.int32) % step
    return (start + step * jnp.arange(max(1, count // step))) % count
