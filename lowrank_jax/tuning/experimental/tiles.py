"""How the outputs of the fused kernel are divided among its programs."""

import dataclasses

from jax.experimental import pallas as pl

from lowrank_jax.tuning.experimental.roofline import Sizes


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program of the kernel computes: positions along the second factor's axis of lines.

    Attributes:
        lines: of the output, over all images: the height of every product.
        positions: fewer make more programs, each of which computes the intermediate of its first
            ones again.
        inputs, outputs: (tap, channel) pairs in the first product, output channels in the second.
        warps, stages: threads in 32s, and depth of the pipelined loads.

    Raises:
        ValueError: a size of a product that is no power of two, at least 16.
    """

    lines: int
    positions: int
    inputs: int
    outputs: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        for name in ("lines", "inputs", "outputs"):
            if (size := getattr(self, name)) != block(size):
                raise ValueError(
                    f"{name}={size!r} is not allowed; give a power of two, at least 16."
                )


def block(size: int) -> int:
    """The least allowed size of a product that holds so many entries."""
    return max(16, pl.next_power_of_2(size))


def tile_of(layer: Sizes, itemsize: int) -> Tile:
    """A tile whose sums and window fit in registers, in strips for a few programs a processor."""
    inputs, rank, outputs = layer.channels
    width = min(64, block(outputs))
    line = block(rank) * (layer.taps[1] * itemsize + 4) + width * 4  # bytes
    fitting = (size for size in (64, 32) if size * line <= 3 * 2**14)  # for sm_90, 64 of 1024 spill
    lines = next(fitting, 16)
    blocks = pl.cdiv(layer.images * layer.result[0], lines)
    strips = min(pl.cdiv(512, blocks), pl.cdiv(layer.result[1], layer.taps[1]))
    dividing = (size for size in (64, 32, 16) if inputs % size == 0)
    pairs = next(dividing, min(32, block(layer.taps[0] * inputs)))
    return Tile(lines, pl.cdiv(layer.result[1], strips), pairs, width)
