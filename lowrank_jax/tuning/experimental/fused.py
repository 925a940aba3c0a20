"""A separable convolution in one GPU kernel, which keeps the rank-K intermediate on the chip.

Two convolutions write the intermediate to memory and read it again. At a small rank that traffic,
not the arithmetic, is most of the layer's time. Here a program holds a column of output lines,
moves along the second factor's axis, and keeps the last taps of the intermediate in registers. This
sliding window shifts nothing, and computes nothing twice but the first positions of a strip.
Written in Pallas for its Triton backend, which runs on GPUs from Ampere on and which JAX 0.11
deprecates with a warning. Elsewhere Pallas interprets it, for tests.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lowrank_jax.tuning.experimental.roofline import (
    HIGHEST,
    ONES,
    UNPADDED,
    Padding,
    Sizes,
    promoted,
    sizes_of,
    two_convolutions,
)
from lowrank_jax.tuning.experimental.tiles import Tile, block, tile_of

DTYPES = ("float32", "bfloat16", "float16")


def separable_conv(
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
    interpret: bool | None = None,
    tile: Tile | None = None,
) -> jax.Array:
    """Computes what `two_convolutions` does, to rounding, in one kernel.

    Sums are float32. The intermediate is rounded to the arrays' type, as in two convolutions, so
    that half precision stays on the tensor cores. Differentiable in reverse mode, by the gradients
    of the two convolutions.

    Args:
        x: images (N, H, W, C), float32, bfloat16 or float16; after promotion the other arrays have
            the same type.
        first: kernel (h, 1, C, K), or (1, w, C, K) where the horizontal convolution is first.
        second: kernel (1, w, K, n), or (h, 1, K, n).
        bias: (n,), or None.
        strides: (vertical, horizontal).
        padding: (before, after) for the vertical and for the horizontal axis.
        first_axis: "vertical" or "horizontal", the axis of ``first``.
        groups, dilation: 1, or refused.
        precision: HIGHEST computes float32 in float32, None in TensorFloat-32 on a GPU's tensor
            cores.
        interpret: whether Pallas interprets the kernel, for tests. None interprets it unless on a
            GPU.
        tile: see `Tile`; None chooses one.

    Returns:
        Array of shape (N, H', W', n). Where the input is infinite it may be NaN, because K is
        padded to a power of two.

    Raises:
        ValueError: groups, a dilation, another type, or shapes that do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, pads = jnp.ones((1, 6, 6, 4)), ((1, 1), (1, 1))
        >>> vertical, horizontal = jnp.ones((3, 1, 4, 2)), jnp.ones((1, 3, 2, 8))
        >>> separable_conv(x, vertical, horizontal, padding=pads).shape
        (1, 6, 6, 8)
    """
    arrays = promoted(x, first, second, bias)
    _check(arrays, groups, dilation)
    layer = sizes_of(x.shape, first.shape, second.shape, strides, padding, first_axis)
    if 0 in (*x.shape, *first.shape, *second.shape, *layer.result):
        return two_convolutions(
            *arrays, strides=strides, padding=padding, first_axis=first_axis, precision=precision
        )
    interpret = jax.default_backend() != "gpu" if interpret is None else interpret
    return _fused(
        layer, tile or tile_of(layer, arrays[0].dtype.itemsize), precision, interpret, *arrays
    )


def _check(arrays: Sequence[Any], groups: int, dilation: Sequence[int]) -> None:
    for name, value in (("groups", groups), ("dilation", dilation)):
        if np.any(np.not_equal(value, 1)):
            raise ValueError(
                f"{name}={value!r} is not allowed; the kernel does only 1. Call two_convolutions."
            )
    if arrays[0].dtype.name not in DTYPES:
        raise ValueError(
            f"dtype {arrays[0].dtype} is not allowed; give one of {DTYPES}, or call "
            "two_convolutions."
        )
    second, bias = arrays[2:]
    if bias is not None and bias.shape != second.shape[-1:]:
        raise ValueError(
            f"bias of shape {bias.shape} is not allowed; give {second.shape[-1:]}, the output "
            "channels."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _fused(layer: Sizes, tile: Tile, precision, interpret: bool, x, first, second, bias):
    inputs, rank, outputs = layer.channels
    first, second = first.reshape(-1, rank), second.reshape(-1, rank, outputs)
    ranks, channels = (0, block(rank) - rank), (0, -outputs % tile.outputs)
    first = jnp.pad(first, ((0, -len(first) % tile.inputs), ranks))
    second = jnp.pad(second, ((0, 0), ranks, channels))
    bias = jnp.zeros(second.shape[-1], x.dtype) if bias is None else jnp.pad(bias, channels)
    lines, positions = layer.images * layer.result[0], layer.result[1]
    dot = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    out = pl.pallas_call(
        functools.partial(_program, layer, tile, dot),
        jax.ShapeDtypeStruct((lines * positions, outputs), x.dtype),
        grid=(pl.cdiv(lines, tile.lines), pl.cdiv(positions, tile.positions)),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    )(x.reshape(-1, inputs), first, second, bias)
    return out.reshape(layer.images, *layer.ordered(layer.result), outputs)


def _backward(
    layer: Sizes, tile: Tile, precision, interpret: bool, arrays: tuple, gradient: jax.Array
) -> tuple:
    strides, padding = layer.ordered(layer.strides), layer.ordered(layer.padding)
    options = dict(
        strides=strides, padding=padding, first_axis=layer.first_axis, precision=precision
    )
    run = functools.partial(two_convolutions, **options)
    return jax.vjp(run, *arrays)[1](gradient)


_fused.defvjp(lambda *args: (_fused(*args), args[4:]), _backward)


def _program(
    layer: Sizes, tile: Tile, dot: Callable, x_ref, first_ref, second_ref, bias_ref, out_ref
) -> None:
    """Computes a strip of positions of a number of lines."""
    line = pl.program_id(0) * tile.lines + lax.iota(jnp.int32, tile.lines)[:, None]
    begin, taps, stride = pl.program_id(1) * tile.positions, layer.taps[1], layer.strides[1]
    new = min(taps, stride)
    between = functools.partial(_between, layer, dot, x_ref, first_ref, tile.inputs, line)
    emit = functools.partial(_emit, layer, dot, second_ref, bias_ref, out_ref, tile.outputs, line)

    def step(i, window):
        position = begin + jnp.int32(i)
        left = position * stride - layer.padding[1][0]
        window = (*window, *(between(left + tap) for tap in range(taps - new, taps)))
        emit(position, window)
        return window[new:]

    left = begin * stride - layer.padding[1][0]
    lax.fori_loop(0, tile.positions, step, tuple(between(left + tap) for tap in range(taps - new)))


def _between(layer: Sizes, dot: Callable, x_ref, first_ref, width: int, line, b):
    """The intermediate (lines, K) at position b; outside of the image zero, as padding is."""
    image, a_result = _divide(line, layer.result[0])
    inside = (line < layer.images * layer.result[0]) & (b >= 0) & (b < layer.shape[1])
    channels, columns = layer.channels[0], lax.iota(jnp.int32, width)[None, :]

    def step(i, total):
        # Where blocks divide the channels, the tap is a scalar. Triton then knows that the loads
        # are contiguous.
        begin, whole = jnp.int32(i) * width, channels % width == 0
        tap, channel = _divide(begin if whole else begin + columns, channels)
        rest = columns if whole else 0
        a = a_result * layer.strides[0] - layer.padding[0][0] + tap
        mask = inside & (a >= 0) & (a < layer.shape[0]) & (tap < layer.taps[0])
        patch = triton.load(
            x_ref.at[layer.row(layer.shape, image, a, b), channel + rest], mask=mask, other=0
        )
        return total + dot(patch, first_ref[pl.ds(jnp.int32(i) * width, width), :])

    start = jnp.zeros((len(line), first_ref.shape[1]), jnp.float32)
    return lax.fori_loop(0, first_ref.shape[0] // width, step, start).astype(x_ref.dtype)


def _emit(
    layer: Sizes, dot: Callable, second_ref, bias_ref, out_ref, width: int, line, b, window
) -> None:
    """Writes the outputs at position b from the intermediate under each tap."""
    image, a = _divide(line, layer.result[0])
    row = layer.row(layer.result, image, a, b)
    live = (line < layer.images * layer.result[0]) & (b < layer.result[1])

    def step(i, carry):
        block = pl.ds(jnp.int32(i) * width, width)
        total = bias_ref[block].astype(jnp.float32)[None, :]
        for tap, between in enumerate(window):
            total += dot(between, second_ref[tap, :, block])
        channel = jnp.int32(i) * width + lax.iota(jnp.int32, width)[None, :]
        mask = live & (channel < layer.channels[2])
        triton.store(out_ref.at[row, channel], total.astype(out_ref.dtype), mask=mask)
        return carry

    lax.fori_loop(0, second_ref.shape[2] // width, step, None)


def _divide(value, divisor: int):
    """Quotient and remainder of numbers that are not negative, without `divmod`'s corrections."""
    by = lax.full_like(value, divisor)
    return lax.div(value, by), lax.rem(value, by)
