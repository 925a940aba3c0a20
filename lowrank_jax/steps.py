"""The ways to compute one convolution: as it is, or as one product and copies of the inputs or outputs, shifted."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def shift(inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """A convolution along one axis as one product to the channels of all taps, then a sum of shifted slices.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last, and is that function where the kernel has
    taps along more than one axis, groups or dilated inputs, or where it is such a product already. Sums in float32 or
    wider.
    """
    cuts = _cuts(inputs, kernel, strides, padding, options)
    moved = [cut for cut in cuts if not cut.idle]
    if not cuts or len(moved) > 1:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    cut, (channels, features) = (moved or cuts)[0], kernel.shape[-2:]
    flat = kernel.reshape(-1, channels, features).transpose(1, 0, 2).reshape(channels, -1)
    spread = _product(cut.pad(inputs), flat, options)  # the product has the channels of all taps to pad
    parts = [cut.tap(spread, i)[..., i * features : (i + 1) * features] for i in range(cut.taps)]
    return sum(parts[1:], parts[0]).astype(jnp.result_type(inputs, kernel))


def gather(inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """A convolution as one product with shifted copies of the inputs side by side, one for each tap.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last with two spatial axes, and is that function
    where there are groups, dilated inputs or other axes, or where it is such a product already. Sums in float32 or
    wider.
    """
    cuts = _cuts(inputs, kernel, strides, padding, options)
    if not cuts:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    rows, columns = cuts
    spread = columns.pad(rows.pad(inputs))
    taps = itertools.product(range(rows.taps), range(columns.taps))
    patches = jnp.concatenate([columns.tap(rows.tap(spread, i), j) for i, j in taps], -1)
    flat = kernel.reshape(-1, kernel.shape[-1])
    return _product(patches, flat, options).astype(jnp.result_type(inputs, kernel))


STEPS: dict[str, Callable] = {"convolve": jax.lax.conv_general_dilated, "shift": shift, "gather": gather}


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Slices of an array along one of its axes, one for each tap."""

    axis: int
    taps: int
    padding: tuple[int, int]
    dilation: int
    stride: int
    outputs: int

    @property
    def idle(self) -> bool:
        """Whether the one slice is the whole array."""
        return (self.taps, self.stride, self.padding) == (1, 1, (0, 0))

    def pad(self, x: jax.Array) -> jax.Array:
        """The array with zeros before and after, joined to it: XLA's CPU loop for a padding asks at each element."""
        zeros = [jnp.zeros((*x.shape[: self.axis], n, *x.shape[self.axis + 1 :]), x.dtype) for n in self.padding]
        return jnp.concatenate([zeros[0], x, zeros[1]], self.axis) if any(self.padding) else x

    def tap(self, x: jax.Array, index: int) -> jax.Array:
        start = index * self.dilation
        stop = start + (self.outputs - 1) * self.stride + 1
        return jax.lax.slice_in_dim(x, start, stop, self.stride, self.axis)


def _cuts(inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, options: dict[str, Any]) -> list[_Cut]:
    """How to cut the inputs along each of the two axes; none where that does not give the convolution."""
    size, dilation = kernel.shape[:-2], tuple(options.get("rhs_dilation") or (1,) * (kernel.ndim - 2))
    plain = options.get("feature_group_count", 1) == 1 and set(options.get("lhs_dilation") or (1,)) == {1}
    if len(size) != 2 or not plain:
        return []
    pads = padding_as_numbers(padding, inputs.shape[1:-1], size, strides, dilation)
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    outputs = [(inputs.shape[1 + i] + sum(pads[i]) - reach[i]) // strides[i] + 1 for i in (0, 1)]
    if min(min(pair) for pair in pads) < 0 or min(outputs) < 1:
        return []
    cuts = [_Cut(1 + i, size[i], pads[i], dilation[i], strides[i], outputs[i]) for i in (0, 1)]
    return [] if all(cut.idle for cut in cuts) and _product_as_convolution(inputs, kernel) else cuts


def padding_as_numbers(
    padding: Any, extent: Sequence[int], size: Sequence[int], strides: Any, dilation: Any, input_dilation: Any = None
) -> tuple[tuple[int, int], ...]:
    """(before, after) for each spatial axis, of a padding that may be "SAME" or "VALID".

    Args:
        padding: a name or pairs.
        extent, size: of the inputs and of the kernel along each spatial axis.
        strides, dilation, input_dilation: one entry for each spatial axis; 1 without the last.
    """
    if not isinstance(padding, str):
        return tuple((before, after) for before, after in padding)
    spread = input_dilation or (1,) * len(size)
    pairs = ((extent, spread), (size, dilation))
    whole, reach = ([(n - 1) * d + 1 for n, d in zip(*pair, strict=True)] for pair in pairs)
    return tuple(jax.lax.padtype_to_pads(whole, reach, strides, padding))


def _product(x: jax.Array, matrix: jax.Array, options: dict[str, Any]) -> jax.Array:
    """The product over the channels, (batch, height, width, channels) by (channels, features), in float32 or wider."""
    wide, precision = jnp.promote_types(jnp.result_type(x, matrix), jnp.float32), options.get("precision")
    if _product_as_convolution(x, matrix):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, matrix[None, None], (1, 1), "VALID", dimension_numbers=names, precision=precision
        )
    return jnp.matmul(x, matrix, precision=precision, preferred_element_type=wide)


def _product_as_convolution(x: jax.Array, weights: jax.Array) -> bool:
    """Whether a 1x1 convolution is the better form of a product.

    XLA's CPU compiler makes the same product of it, but later than of a product of arrays: loops that are fused with
    a reshaped array ran up to twice as long. In half precision only a product is run by its fast kernels.
    """
    wide = jnp.promote_types(jnp.result_type(x, weights), jnp.float32)
    return jax.default_backend() == "cpu" and x.dtype == weights.dtype == wide
