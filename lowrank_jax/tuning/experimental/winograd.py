"""A convolution with fewer multiplications: minimal filtering along one axis, after Winograd."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.tuning.slices import Cut, cut_axes

OUTPUTS = 4  # computed together along the axis
POINTS = (
    0.0,
    1.0,
    -1.0,
    2.0,
    -2.0,
    0.5,
    -0.5,
)  # of the polynomials; near one and of few bits, for little rounding
MOST_TAPS = len(POINTS) + 2 - OUTPUTS


def winograd(
    inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """A convolution of which four outputs along one axis share their products: for 3 taps 6
    products instead of 12.

    ``y = A ((G w) * (B x))``: tiles of the inputs, n = 4 + taps - 1 each, and the taps are
    transformed, multiplied by n convolutions with one tap along that axis, and their results
    transformed to the four outputs (Lavin and Gray, arXiv 1509.09308, along one axis only). Along
    one axis rounding grows little: the root mean square error is two to three times that of the
        convolution in float32. An infinite input or NaN spoils all outputs of its tile.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last with two spatial axes,
    and is that function where neither axis has 2 to 5 taps without strides and dilation, where
    there are groups or dilated inputs, in half
    precision, and on other backends than the CPU: they have such kernels of their own, or multiply
        float32 in less.
    """
    axes = cut_axes(inputs, kernel, strides, padding, options)
    cut = next(filter(_fits, axes), None)
    wide = inputs.dtype == kernel.dtype == jnp.promote_types(kernel.dtype, jnp.float32)
    if cut is None or not wide or jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    kernel = _after(kernel, inputs)
    outward, taps, inward = transforms(cut.taps)
    pads = [(0, 0) if own is cut else own.padding for own in axes]
    parts = [
        jax.lax.conv_general_dilated(x, w, strides, pads, **options)
        for x, w in zip(
            _sums(inward, _tiles(cut, inputs)),
            _sums(taps, _split(kernel, cut.axis - 1)),
            strict=True,
        )
    ]
    whole = list(parts[0].shape)
    whole[cut.axis] *= OUTPUTS
    joined = jnp.stack(_sums(outward, parts), cut.axis + 1).reshape(whole)
    return jax.lax.slice_in_dim(joined, 0, cut.outputs, axis=cut.axis)


@functools.cache
def transforms(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices A (outputs x n), G (n x taps) and B (n x n) of the module's formula, by the
    method of Toom and Cook.

    The outputs are the transpose of a product of polynomials, which is known by its values at n - 1
    points and its leading coefficient. In float64, exact but for some of G.

    Example:
        >>> outward, own, inward = transforms(3)
        >>> x, w = np.arange(6.0), np.asarray([1.0, 2.0, 4.0])
        >>> (outward @ ((own @ w) * (inward @ x))).round(9).tolist() == np.convolve(x, w[::-1], "valid").tolist()
        True
    """
    points = np.asarray(POINTS[: OUTPUTS + taps - 2])
    others = [np.delete(points, index) for index in range(len(points))]
    scales = [math.prod(point - rest) for point, rest in zip(points, others, strict=True)]
    inward = [*([*np.poly(rest)[::-1], 0] for rest in others), np.poly(points)[::-1]]
    return (
        _values(points, OUTPUTS).T,
        _values(points, taps) / [[scale] for scale in [*scales, 1]],
        np.asarray(inward),
    )


def _values(points: np.ndarray, count: int) -> np.ndarray:
    """Powers of each point, and the leading one alone."""
    return np.concatenate([np.vander(points, count, increasing=True), np.eye(count)[-1:]])


def _fits(cut: Cut) -> bool:
    return 2 <= cut.taps <= MOST_TAPS and cut.stride == cut.dilation == 1


def _after(kernel: jax.Array, inputs: jax.Array) -> jax.Array:
    """The kernel, which XLA believes to depend on the inputs.

    Else it transforms all kernels of a network before the first layer, and what it keeps between
    the layers grows above
    the 32 MiB from which on Linux it is mapped anew in each run: VGG-16 at the authors' ranks 53
        MiB instead of 24, and
    17 instead of 26 images/s. XLA for CPUs drops an optimization barrier before that (jax 0.10.2).
    """
    return jnp.where(jnp.any(inputs.ravel()[:1] > jnp.inf), 0, kernel)


def _tiles(cut: Cut, inputs: jax.Array) -> list[jax.Array]:
    """What each place of a tile holds, of all tiles; the last tile may reach beyond the outputs,
    into zeros."""
    count = -(-cut.outputs // OUTPUTS)
    beyond = count * OUTPUTS - cut.outputs
    padded = dataclasses.replace(cut, padding=(cut.padding[0], cut.padding[1] + beyond)).pad(inputs)
    stop = (count - 1) * OUTPUTS + 1
    return [
        jax.lax.slice_in_dim(padded, place, place + stop, OUTPUTS, cut.axis)
        for place in range(OUTPUTS + cut.taps - 1)
    ]


def _split(kernel: jax.Array, axis: int) -> list[jax.Array]:
    return [
        jax.lax.slice_in_dim(kernel, tap, tap + 1, axis=axis) for tap in range(kernel.shape[axis])
    ]


def _sums(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Sums of the arrays, one for each row of factors; zeros and ones cost nothing."""
    rows = [
        [x if by == 1 else float(by) * x for by, x in zip(row, arrays, strict=True) if by]
        for row in matrix
    ]
    return [sum(row[1:], row[0]) for row in rows]
