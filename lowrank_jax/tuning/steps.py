"""The ways to compute one convolution: as it is, or as one product and copies of the inputs or
outputs, shifted."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_jax.tuning.experimental.winograd import winograd
from lowrank_jax.tuning.slices import cut_axes, product_as_convolution


def shift(
    inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """A convolution along one axis as one product to the channels of all taps, then a sum of
    shifted slices.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last, and is that function
    where the kernel has taps along more than one axis, groups or dilated inputs, or where it is
    such a product already. Sums in float32 or wider.
    """
    cuts = cut_axes(inputs, kernel, strides, padding, options)
    moved = [cut for cut in cuts if not cut.idle]
    if not cuts or len(moved) > 1:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    cut, (channels, features) = (moved or cuts)[0], kernel.shape[-2:]
    flat = kernel.reshape(-1, channels, features).transpose(1, 0, 2).reshape(channels, -1)
    spread = _product(
        cut.pad(inputs), flat, options
    )  # the product has the channels of all taps to pad
    parts = [cut.tap(spread, i)[..., i * features : (i + 1) * features] for i in range(cut.taps)]
    return sum(parts[1:], parts[0]).astype(jnp.result_type(inputs, kernel))


def gather(
    inputs: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """A convolution as one product with shifted copies of the inputs side by side, one for each
    tap.

    Takes the arguments of ``jax.lax.conv_general_dilated``, channels last with two spatial axes,
    and is that function where there are groups, dilated inputs or other axes, or where it is such a
    product already. Sums in float32 or wider.
    """
    cuts = cut_axes(inputs, kernel, strides, padding, options)
    if not cuts:
        return jax.lax.conv_general_dilated(inputs, kernel, strides, padding, **options)
    rows, columns = cuts
    spread = columns.pad(rows.pad(inputs))
    taps = itertools.product(range(rows.taps), range(columns.taps))
    patches = jnp.concatenate([columns.tap(rows.tap(spread, i), j) for i, j in taps], -1)
    flat = kernel.reshape(-1, kernel.shape[-1])
    return _product(patches, flat, options).astype(jnp.result_type(inputs, kernel))


STEPS: dict[str, Callable] = {
    "convolve": jax.lax.conv_general_dilated,
    "shift": shift,
    "gather": gather,
    "winograd": winograd,
}


def _product(x: jax.Array, matrix: jax.Array, options: dict[str, Any]) -> jax.Array:
    """The product over the channels, (batch, height, width, channels) by (channels, features), in
    float32 or wider."""
    wide, precision = (
        jnp.promote_types(jnp.result_type(x, matrix), jnp.float32),
        options.get("precision"),
    )
    if product_as_convolution(x, matrix):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, matrix[None, None], (1, 1), "VALID", dimension_numbers=names, precision=precision
        )
    return jnp.matmul(x, matrix, precision=precision, preferred_element_type=wide)
