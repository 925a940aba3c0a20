"""The slices of an array that a convolution multiplies, one for each tap along an axis."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Pads = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Taps:
    """The taps of a kernel along one axis of an array.

    Attributes:
        axis: of the array.
        count: number of taps.
        padding: (before, after).
        dilation: from one tap to the next.
        stride: from one output to the next.
        outputs: number of outputs.
    """

    axis: int
    count: int
    padding: tuple[int, int]
    dilation: int
    stride: int
    outputs: int

    @property
    def idle(self) -> bool:
        """Whether the one slice is the whole array."""
        return (self.count, self.stride, self.padding) == (1, 1, (0, 0))

    def pad(self, x: jax.Array) -> jax.Array:
        """The array with zeros before and after.

        They are joined to it, because XLA's CPU loop for a padding asks at each element.
        """
        if not any(self.padding):
            return x
        shapes = [(*x.shape[: self.axis], n, *x.shape[self.axis + 1 :]) for n in self.padding]
        before, after = (jnp.zeros(shape, x.dtype) for shape in shapes)
        return jnp.concatenate([before, x, after], self.axis)

    def slice_of(self, x: jax.Array, index: int) -> jax.Array:
        """What the tap of an index multiplies."""
        start = index * self.dilation
        stop = start + (self.outputs - 1) * self.stride + 1
        return jax.lax.slice_in_dim(x, start, stop, self.stride, self.axis)


def taps_of(
    inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, options: Mapping[str, Any]
) -> list[Taps]:
    """The taps along each of the two axes; none where slices do not give the convolution.

    Args:
        inputs: (batch, height, width, channels).
        kernel: (height, width, channels, features).
        strides, padding, options: as in ``jax.lax.conv_general_dilated``.
    """
    size = kernel.shape[:-2]
    dilation = tuple(options.get("rhs_dilation") or (1,) * len(size))
    spread = options.get("lhs_dilation") or (1,)
    if len(size) != 2 or options.get("feature_group_count", 1) != 1 or set(spread) != {1}:
        return []
    pads = padding_as_numbers(padding, inputs.shape[1:-1], size, strides, dilation)
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    outputs = [(inputs.shape[1 + i] + sum(pads[i]) - reach[i]) // strides[i] + 1 for i in (0, 1)]
    if min(min(pair) for pair in pads) < 0 or min(outputs) < 1:
        return []
    taps = [Taps(1 + i, size[i], pads[i], dilation[i], strides[i], outputs[i]) for i in (0, 1)]
    product = all(one.idle for one in taps)
    return [] if product and product_as_convolution(inputs, kernel) else taps


def padding_as_numbers(
    padding: Any,
    extent: Sequence[int],
    size: Sequence[int],
    strides: Any,
    dilation: Any,
) -> Pads:
    """(before, after) for each spatial axis, of a padding that may be "SAME" or "VALID".

    Args:
        padding: a name or pairs.
        extent, size: of the inputs and of the kernel along each spatial axis.
        strides, dilation: one entry for each spatial axis.

    Example:
        >>> padding_as_numbers("SAME", extent=(8, 8), size=(3, 2), strides=(1, 1), dilation=(1, 1))
        ((1, 1), (0, 1))
    """
    if not isinstance(padding, str):
        return tuple((before, after) for before, after in padding)
    reach = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
    return tuple(jax.lax.padtype_to_pads(extent, reach, strides, padding))


def product_as_convolution(x: jax.Array, weights: jax.Array) -> bool:
    """Whether a 1x1 convolution is the better form of a product.

    XLA's CPU compiler makes the same product of it, but later than of a product of arrays: loops
    that are fused with a reshaped array ran up to twice as long. In half precision only a product
    is run by its fast kernels.
    """
    wide = jnp.promote_types(jnp.result_type(x, weights), jnp.float32)
    return jax.default_backend() == "cpu" and x.dtype == weights.dtype == wide
