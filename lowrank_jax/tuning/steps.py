"""Algorithms of one convolution: the convolution itself, or one product and shifted copies."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowrank_jax.tuning.experimental.winograd import winograd
from lowrank_jax.tuning.slices import product_as_convolution, taps_of


def kn2row(
    inputs: Float[Array, "n *space c"],
    kernel: Float[Array, "*taps i o"],
    strides: Any,
    padding: Any,
    **options: Any,
) -> Float[Array, "n *out o"]:
    """A convolution along one axis as one product to the channels of all taps, whose shifted slices
    are added.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last. It is that function
    where the kernel has taps along more than one axis, groups or dilated inputs, and where the
    convolution is such a product already. Sums are of float32 or wider.
    """
    axes = taps_of(inputs, kernel, strides, padding, options)
    moved = [taps for taps in axes if not taps.idle]
    if not axes or len(moved) > 1:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    taps, (channels, features) = (moved or axes)[0], kernel.shape[-2:]
    flat = kernel.reshape(-1, channels, features).transpose(1, 0, 2).reshape(channels, -1)
    product = _product(taps.pad(inputs), flat, options)
    blocks = [product[..., i * features : (i + 1) * features] for i in range(taps.count)]
    parts = [taps.slice_of(block, i) for i, block in enumerate(blocks)]
    return sum(parts[1:], parts[0]).astype(jnp.result_type(inputs, kernel))


def im2col(
    inputs: Float[Array, "n *space c"],
    kernel: Float[Array, "*taps i o"],
    strides: Any,
    padding: Any,
    **options: Any,
) -> Float[Array, "n *out o"]:
    """A convolution as one product with shifted copies of the inputs side by side, one for each
    tap.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last with two spatial axes. It
    is that function where there are groups, dilated inputs or other axes, and where the convolution
    is such a product already. Sums are of float32 or wider.
    """
    axes = taps_of(inputs, kernel, strides, padding, options)
    if not axes:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    rows, columns = axes
    padded = columns.pad(rows.pad(inputs))
    taps = itertools.product(range(rows.count), range(columns.count))
    patches = [columns.slice_of(rows.slice_of(padded, i), j) for i, j in taps]
    flat = kernel.reshape(-1, kernel.shape[-1])
    product = _product(jnp.concatenate(patches, -1), flat, options)
    return product.astype(jnp.result_type(inputs, kernel))


STEPS: dict[str, Callable[..., Float[Array, "n *out o"]]] = {
    "convolve": jax.lax.conv_general_dilated,
    "kn2row": kn2row,
    "im2col": im2col,
    "winograd": winograd,
}


def _product(
    x: Float[Array, "n h w c"], matrix: Float[Array, "c o"], options: Mapping[str, Any]
) -> Float[Array, "n h w o"]:
    """The product over the channels, in float32 or wider."""
    precision = options.get("precision")
    if product_as_convolution(x, matrix):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, matrix[None, None], (1, 1), "VALID", dimension_numbers=names, precision=precision
        )
    wide = jnp.promote_types(jnp.result_type(x, matrix), jnp.float32)
    return jnp.matmul(x, matrix, precision=precision, preferred_element_type=wide)
