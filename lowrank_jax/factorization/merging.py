"""Factors multiplied back into the dense kernel that they stand for."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factorization.axes import INPUTS, OUTPUTS, only, sizes_of, spatial_axes
from lowrank_jax.factorization.factors import (
    check_array,
    dense_shape,
    fit_together,
    is_factors,
    read_factors,
)
from lowrank_jax.factorization.layout import Array, merged, parted
from lowrank_jax.factorization.placement import dense_sharding, gathered, placed


def merge(first: jax.Array, second: jax.Array, axes: str = "HWIO") -> jax.Array:
    """Multiplies two factors back into one dense kernel.

    Args:
        first, second: factors as `Scheme.factor` returns them, such as (..., h, 1, c, groups *
            rank) and (..., 1, w, rank, n), in the layout given.
        axes: layout of the factors.

    Returns:
        The kernel, such as (..., h, w, c, n), that the two operations together apply.

    Raises:
        ValueError: the arrays are not the factors of one kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> merge(jnp.ones((5, 1, 3, 10)), jnp.ones((1, 5, 10, 192))).shape
        (5, 5, 3, 192)
    """
    _check_pair(first, second, axes)
    dtype = jnp.result_type(first, second)
    wide = jnp.promote_types(dtype, jnp.float32)
    one, two = (jnp.asarray(gathered(x), wide) for x in (first, second))
    dense = multiplied(one, two, axes)
    return placed(dense.astype(dtype), dense_sharding((first, second), axes))


def _check_pair(first: jax.Array, second: jax.Array, axes: str) -> None:
    for factor in (first, second):
        check_array(factor, "merge")
    one, two = _one_stack(first.shape, second.shape, axes)
    known = {"I", "O"} <= {*axes} and len(set(axes)) == len(axes)
    if not known or not fit_together(one, two, axes):
        raise ValueError(
            f"merge: factors of shapes {first.shape} and {second.shape} do not fit together in the "
            f"layout {axes=}; give the two that Scheme.factor returns, and their layout."
        )


def _one_stack(one: Sequence[int], two: Sequence[int], axes: str) -> list[tuple[int, ...]]:
    """The shapes of two factors, each with the other's stack where its own is shared."""
    pairs = [(one, two), (two, one)]
    count = max(len(one) - len(axes), 0)
    return [
        (*(b if a == 1 else a for a, b in zip(own[:count], other, strict=False)), *own[count:])
        for own, other in pairs
    ]


def multiplied(first: Array, second: Array, axes: str) -> Array:
    """`merge` of arrays on one device, in their own type; of NumPy's arrays in NumPy."""
    parts = [*spatial_axes(axes), only(axes, INPUTS), only(axes, OUTPUTS)]
    left, right = (merged(x, axes, parts) for x in (first, second))
    rank, n = right.shape[-2:]
    left = left.reshape(*left.shape[:-1], -1, rank)  # (..., c, g, K)
    right = right.reshape(*right.shape[:-1], left.shape[-2], -1)  # (..., K, g, n/g)
    # A spatial axis has size 1 in one of the factors, so that broadcasting spreads the taps of the
    # other.
    product = _by_groups(left, right)
    sizes = sizes_of(axes, dense_shape(first.shape, second.shape, axes))
    return parted(product.reshape(*product.shape[:-2], n), axes, parts, sizes)


def _by_groups(left: Array, right: Array) -> Array:
    """Products (..., c, g, n) of (..., c, g, K) and (..., K, g, n)."""
    if isinstance(left, np.ndarray):  # its einsum takes no BLAS for groups
        return (left.swapaxes(-3, -2) @ right.swapaxes(-3, -2)).swapaxes(-3, -2)
    # An einsum is read as a product where a factor stands decomposed itself.
    return jnp.einsum("...cgk,...kgn->...cgn", left, right, precision=jax.lax.Precision.HIGHEST)


def product(node: Mapping, path: str) -> jax.Array:
    """The kernel that a node of a tree stands for.

    Raises:
        ValueError: the node's arrays are not the factors of one kernel.

    Example:
        >>> import jax.numpy as jnp
        >>> node = {"vertical": jnp.ones((3, 1, 4, 2)), "horizontal": jnp.ones((1, 3, 2, 8))}
        >>> product(node, "conv").shape
        (3, 3, 4, 8)
    """
    pair, axes, _ = read_factors(node, path)
    one, two = (product(factor, path) if is_factors(factor) else factor for factor in pair)
    return merge(one, two, axes)
