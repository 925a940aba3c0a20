"""The slices of an array that a convolution multiplies, one for each tap along an axis."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Cut:
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
        """The array with zeros before and after, joined to it: XLA's CPU loop for a padding asks at
        each element."""
        zeros = [
            jnp.zeros((*x.shape[: self.axis], n, *x.shape[self.axis + 1 :]), x.dtype)
            for n in self.padding
        ]
        return jnp.concatenate([zeros[0], x, zeros[1]], self.axis) if any(self.padding) else x

    def tap(self, x: jax.Array, index: int) -> jax.Array:
        start = index * self.dilation
        stop = start + (self.outputs - 1) * self.stride + 1
        return jax.lax.slice_in_dim(x, start, stop, self.stride, self.axis)


def cut_axes(
    inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, options: dict[str, Any]
) -> list[Cut]:
    """How to cut the inputs along each of the two axes; none where that does not give the
    convolution."""
    size, dilation = (
        kernel.shape[:-2],
        tuple(options.get("rhs_dilation") or (1,) * (kernel.ndim - 2)),
    )
    plain = options.get("feature_group_count", 1) == 1 and set(
        options.get("lhs_dilation") or (1,)
    ) == {1}
    if len(size) != 2 or not plain:
        return []
    pads = padding_as_numbers(padding, inputs.shape[1:-1], size, strides, dilation)
    reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    outputs = [(inputs.shape[1 + i] + sum(pads[i]) - reach[i]) // strides[i] + 1 for i in (0, 1)]
    if min(min(pair) for pair in pads) < 0 or min(outputs) < 1:
        return []
    cuts = [Cut(1 + i, size[i], pads[i], dilation[i], strides[i], outputs[i]) for i in (0, 1)]
    return [] if all(cut.idle for cut in cuts) and product_as_convolution(inputs, kernel) else cuts


def padding_as_numbers(
    padding: Any,
    extent: Sequence[int],
    size: Sequence[int],
    strides: Any,
    dilation: Any,
    input_dilation: Any = None,
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


def product_as_convolution(x: jax.Array, weights: jax.Array) -> bool:
    """Whether a 1x1 convolution is the better form of a product.

    XLA's CPU compiler makes the same product of it, but later than of a product of arrays: loops
    that are fused with a reshaped array ran up to twice as long. In half precision only a product
    is run by its fast kernels.
    """
    wide = jnp.promote_types(jnp.result_type(x, weights), jnp.float32)
    return jax.default_backend() == "cpu" and x.dtype == weights.dtype == wide
