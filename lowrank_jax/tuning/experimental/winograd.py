"""A convolution with fewer multiplications: minimal filtering along one axis, after Winograd."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowrank_jax.tuning.slices import Taps, taps_of

OUTPUTS = 4  # computed together along the axis
# Of the polynomials: near one and of few bits, for little rounding.
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
MOST_TAPS = len(POINTS) + 2 - OUTPUTS


def winograd(
    inputs: Float[Array, "n *space c"],
    kernel: Float[Array, "*taps i o"],
    strides: Any,
    padding: Any,
    **options: Any,
) -> Float[Array, "n *out o"]:
    """A convolution of which four outputs along one axis share their products.

    ``y = A ((G w) * (B x))`` takes 6 products for 3 taps instead of 12. Tiles of the inputs, n = 4
    + taps - 1 each, and the taps are transformed. They are multiplied by n convolutions with one
    tap along that axis, and the results are transformed to the four outputs (Lavin and Gray, arXiv
    1509.09308, along one axis only). Along one axis rounding grows little: the root mean square
    error is two to three times that of the convolution in float32. An infinite input or NaN spoils
    all outputs of its tile.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last with two spatial axes. It
    is that function where neither axis has 2 to 5 taps without strides and dilation, where there
    are groups or dilated inputs, in half precision, and on other backends than the CPU. Other
    backends have such kernels of their own, or multiply float32 in a lower precision.
    """
    axes = taps_of(inputs, kernel, strides, padding, options)
    taps = next(filter(_fits, axes), None)
    wide = inputs.dtype == kernel.dtype == jnp.promote_types(kernel.dtype, jnp.float32)
    if taps is None or not wide or jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    outward, own, inward = transforms(taps.count)
    pads = [(0, 0) if each is taps else each.padding for each in axes]
    tiles = _sums(inward, _tiles(taps, inputs))
    kernels = _sums(own, _split(_after(kernel, inputs), taps.axis - 1))
    products = [
        jax.lax.conv_general_dilated(x, w, strides, pads, **options)
        for x, w in zip(tiles, kernels, strict=True)
    ]
    return _joined(taps, _sums(outward, products))


@functools.cache
def transforms(taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrices A (outputs x n), G (n x taps) and B (n x n) of the module's formula.

    By the method of Toom and Cook: the outputs are the transpose of a product of polynomials, which
    is known by its values at n - 1 points and its leading coefficient. In float64, exact but for
    some of G.

    Example:
        >>> outward, own, inward = transforms(3)
        >>> x, w = np.arange(6.0), np.asarray([1.0, 2.0, 4.0])
        >>> found = outward @ ((own @ w) * (inward @ x))
        >>> found.round(9).tolist() == np.convolve(x, w[::-1], "valid").tolist()
        True
    """
    points = np.asarray(POINTS[: OUTPUTS + taps - 2])
    others = [np.delete(points, index) for index in range(len(points))]
    scales = [math.prod(point - rest) for point, rest in zip(points, others, strict=True)]
    inward = [*([*np.poly(rest)[::-1], 0] for rest in others), np.poly(points)[::-1]]
    own = _values(points, taps) / [[scale] for scale in [*scales, 1]]
    return _values(points, OUTPUTS).T, own, np.asarray(inward)


def _values(points: np.ndarray, count: int) -> np.ndarray:
    """Powers of each point, and the leading one alone."""
    return np.concatenate([np.vander(points, count, increasing=True), np.eye(count)[-1:]])


def _fits(taps: Taps) -> bool:
    return 2 <= taps.count <= MOST_TAPS and taps.stride == taps.dilation == 1


def _after(kernel: jax.Array, inputs: jax.Array) -> jax.Array:
    """The kernel, which XLA believes to depend on the inputs.

    Else XLA transforms all kernels of a network before the first layer. What is kept between the
    layers then grows above the 32 MiB from which on Linux it is mapped anew in each run: VGG-16 at
    the authors' ranks 53 MiB instead of 24, and 17 instead of 26 images/s. XLA for CPUs drops an
    optimization barrier before that (jax 0.10.2).
    """
    return jnp.where(jnp.any(inputs.ravel()[:1] > jnp.inf), 0, kernel)


def _tiles(taps: Taps, inputs: jax.Array) -> list[jax.Array]:
    """What each place of a tile holds, of all tiles.

    The last tile may reach beyond the outputs, into zeros.
    """
    count = -(-taps.outputs // OUTPUTS)
    beyond = count * OUTPUTS - taps.outputs
    before, after = taps.padding
    padded = dataclasses.replace(taps, padding=(before, after + beyond)).pad(inputs)
    stop = (count - 1) * OUTPUTS + 1
    return [
        jax.lax.slice_in_dim(padded, place, place + stop, OUTPUTS, taps.axis)
        for place in range(OUTPUTS + taps.count - 1)
    ]


def _joined(taps: Taps, parts: Sequence[jax.Array]) -> jax.Array:
    """The outputs in their order; each part has one of every four."""
    shape = list(parts[0].shape)
    shape[taps.axis] *= OUTPUTS
    whole = jnp.stack(parts, taps.axis + 1).reshape(shape)
    return jax.lax.slice_in_dim(whole, 0, taps.outputs, axis=taps.axis)


def _split(kernel: jax.Array, axis: int) -> list[jax.Array]:
    taps = range(kernel.shape[axis])
    return [jax.lax.slice_in_dim(kernel, tap, tap + 1, axis=axis) for tap in taps]


def _sums(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Sums of the arrays, one for each row of factors; zeros and ones cost nothing."""
    rows = [
        [x if by == 1 else float(by) * x for by, x in zip(row, arrays, strict=True) if by]
        for row in matrix
    ]
    return [sum(row[1:], row[0]) for row in rows]
