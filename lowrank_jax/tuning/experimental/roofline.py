"""Sizes of a separable layer with two spatial axes, its two convolutions, and its least time."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowrank_jax.factorization.axes import split_options
from lowrank_jax.factorization.separable import FORMS

HIGHEST = lax.Precision.HIGHEST
ONES, UNPADDED = (1, 1), ((0, 0), (0, 0))
Padding = Sequence[Sequence[int]]


def two_convolutions(
    x: jax.Array,
    first: jax.Array,
    second: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: Sequence[int] = ONES,
    padding: Padding = UNPADDED,
    first_axis: str = "vertical",
    groups: int = 1,
    dilation: Sequence[int] = ONES,
    precision: lax.Precision | None = HIGHEST,
) -> jax.Array:
    """Runs the layer as two `jax.lax.conv_general_dilated`, with any groups and dilation.

    Args:
        x, first, second, bias, strides, padding, first_axis, precision: as in `separable_conv`.
        groups, dilation: of both kernels; there are K channels between them per group.

    Returns:
        Array of shape (N, H', W', n).

    Raises:
        ValueError: strides, padding or ``first_axis`` in another form.

    Example:
        >>> import jax.numpy as jnp
        >>> vertical, horizontal = jnp.ones((3, 1, 4, 2)), jnp.ones((1, 3, 2, 8))
        >>> two_convolutions(jnp.ones((1, 6, 6, 4)), vertical, horizontal, strides=(2, 1)).shape
        (1, 2, 4, 8)
    """
    x, first, second, bias = promoted(x, first, second, bias)
    check_axes(strides, padding, first_axis)
    options = {"strides": strides, "padding": padding, "dilation": dilation}
    names = ("NHWC", "HWIO", "NHWC")
    halves = split_options((1, 1), first_axis, options)
    for kernel, own in zip((first, second), halves, strict=True):
        geometry = (own["strides"], own["padding"], None, own["dilation"], names, groups)
        x = lax.conv_general_dilated(x, kernel, *geometry, precision=precision)
    return x if bias is None else x + bias


class Bound(NamedTuple):
    """Work of a program, and the least seconds it takes where arithmetic and transfers overlap."""

    flops: int
    bytes: int
    seconds: float


def roofline(
    x_shape: Sequence[int],
    first_shape: Sequence[int],
    second_shape: Sequence[int],
    dtype: Any,
    flops_per_s: float,
    bytes_per_s: float,
    *,
    bias: bool = False,
    strides: Sequence[int] = ONES,
    padding: Padding = UNPADDED,
    first_axis: str = "vertical",
) -> tuple[Bound, Bound]:
    """Counts the work of `separable_conv` and of `two_convolutions`, and bounds their times.

    The bound is the roofline of Williams et al. (2009).

    Args:
        x_shape, first_shape, second_shape, strides, padding, first_axis: as in `separable_conv`.
        dtype: of every array.
        flops_per_s, bytes_per_s: the machine's peaks, of arithmetic in that type and of its memory.
        bias: whether there is one.

    Returns:
        The fused program, which moves the input, the kernels, the bias and the output once, and the
        two convolutions, which also write and read the intermediate and whose bounds are added. A
        multiply-add, with padding too, is two operations.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> shapes = (1, 8, 8, 4), (1, 1, 4, 2), (1, 1, 2, 4)
        >>> roofline(*shapes, "float32", flops_per_s=1e6, bytes_per_s=1e6)[1]
        Bound(flops=2048, bytes=3136, seconds=0.003136)
    """
    layer = sizes_of(x_shape, first_shape, second_shape, strides, padding, first_axis)
    size, (_, rank, outputs) = jnp.dtype(dtype).itemsize, layer.channels
    between = size * layer.images * layer.result[0] * layer.shape[1] * rank
    out = size * layer.images * prod(layer.result) * outputs
    flops = [2 * between // size * prod(first_shape[:3]), 2 * out // size * prod(second_shape[:3])]
    moved = [
        size * (prod(x_shape) + prod(first_shape)),
        size * (prod(second_shape) + bias * outputs) + out,
    ]

    def bound(flops: int, moved: int) -> Bound:
        return Bound(flops, moved, max(flops / flops_per_s, moved / bytes_per_s))

    one, two = (bound(part, ends + between) for part, ends in zip(flops, moved, strict=True))
    separate = Bound(sum(flops), one.bytes + two.bytes, one.seconds + two.seconds)
    return bound(sum(flops), sum(moved)), separate


class Sizes(NamedTuple):
    """One layer's static sizes.

    A pair is of the axis of the first factor, a, and of the axis of the second, b.
    """

    first_axis: str
    images: int
    channels: tuple[int, int, int]  # C, K, n
    shape: tuple[int, int]
    taps: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]

    @property
    def result(self) -> tuple[int, ...]:
        sizes = zip(self.shape, self.taps, self.strides, self.padding, strict=True)
        return tuple(max(0, (n + sum(pad) - k) // stride + 1) for n, k, stride, pad in sizes)

    def ordered(self, pair: tuple) -> tuple:
        """A pair of (a, b) as (vertical, horizontal), and back."""
        return pair if self.first_axis == "vertical" else pair[::-1]

    def row(self, size: tuple[int, ...], image, a, b):
        """Row of a position in an array of shape (N * H * W, channels)."""
        inner = a * size[1] + b if self.first_axis == "vertical" else b * size[0] + a
        return image * prod(size) + inner


def sizes_of(x, first, second, strides, padding, first_axis: str) -> Sizes:
    """The sizes of a layer of arrays of these shapes, or ValueError if they do not fit."""
    one, two = check_axes(strides, padding, first_axis)
    x, first, second = tuple(x), tuple(first), tuple(second)
    fit = len(x) == len(first) == len(second) == 4 and first[1 - one] == second[1 - two] == 1
    if not fit or (x[3], first[3]) != (first[2], second[2]):
        raise ValueError(
            f"kernels {first} and {second} with first_axis={first_axis!r} do not fit x of shape "
            f"{x}; give (h, 1, C, K) and (1, w, K, n), or (1, w, C, K) and (h, 1, K, n) for the "
            "horizontal one first, and x (N, H, W, C)."
        )
    shape, steps = ((pair[one], pair[two]) for pair in (x[1:3], strides))
    pads = ((padding[one][0], padding[one][1]), (padding[two][0], padding[two][1]))
    return Sizes(
        first_axis, x[0], (x[3], *second[2:]), shape, (first[one], second[two]), steps, pads
    )


def check_axes(strides, padding, first_axis: str) -> tuple[int, int]:
    """The axes of the two factors, or ValueError if the arguments have another form."""
    if first_axis not in FORMS:
        raise ValueError(f"first_axis={first_axis!r} is not allowed; give one of {tuple(FORMS)}.")
    if np.shape(strides) != (2,) or min(strides) < 1:
        raise ValueError(
            f"strides={strides!r} is not allowed; give two positive ints, (vertical, horizontal)."
        )
    if not isinstance(padding, Sequence) or [np.shape(pair) for pair in padding] != [(2,), (2,)]:
        raise ValueError(
            f"padding={padding!r} is not allowed; give (before, after) in ints for both axes."
        )
    return (0, 1) if first_axis == "vertical" else (1, 0)


def promoted(*arrays: jax.Array | None) -> list[Any]:
    """The arrays in the type to which JAX promotes them together; None stays None."""
    dtype = jnp.result_type(*(array for array in arrays if array is not None))
    return [None if array is None else array.astype(dtype) for array in arrays]
