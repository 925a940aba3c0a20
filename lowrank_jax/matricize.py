"""The bijection between convolution kernels and matrices.

This is the only place that knows the order of the axes. For a kernel with height ``h``, width ``w``,
``c`` input channels per group, ``n`` output channels and ``g`` groups the matrix of each group has one
row for every pair (vertical tap, input channel) and one column for every pair (horizontal tap, output
channel of that group), so that its rank-K factors are themselves the kernels of a vertical and of a
horizontal convolution (Tai et al., 2016, arXiv 1511.06067, section 2.1).
"""

import jax
import jax.numpy as jnp


def to_matrix(kernel: jax.Array, groups: int = 1) -> jax.Array:
    """Unfolds a kernel into one matrix per group.

    Args:
        kernel: array of shape (..., h, w, c, n); leading axes are a stack of kernels.
        groups: number of feature groups; must divide n.

    Returns:
        Array of shape (..., groups, h * c, w * n / groups) with the same entries.

    Example:
        >>> import jax.numpy as jnp
        >>> to_matrix(jnp.ones((3, 5, 4, 8)), groups=2).shape
        (2, 12, 20)
    """
    *stack, h, w, c, n = kernel.shape
    split = kernel.reshape(*stack, h, w, c, groups, n // groups)
    grouped = jnp.moveaxis(split, -2, -5)  # (..., g, h, w, c, n/g)
    return grouped.swapaxes(-3, -2).reshape(*stack, groups, h * c, w * (n // groups))


def from_matrix(matrix: jax.Array, shape: tuple[int, int, int, int]) -> jax.Array:
    """Folds one matrix per group back into a kernel; the inverse of `to_matrix`.

    Args:
        matrix: array of shape (..., groups, h * c, w * n / groups).
        shape: the kernel's own shape (h, w, c, n), without any stack.

    Returns:
        Array of shape (..., h, w, c, n).

    Example:
        >>> import jax.numpy as jnp
        >>> from_matrix(jnp.ones((2, 12, 20)), (3, 5, 4, 8)).shape
        (3, 5, 4, 8)
    """
    h, w, c, n = shape
    *stack, groups, _, _ = matrix.shape
    split = matrix.reshape(*stack, groups, h, c, w, n // groups)
    ungrouped = jnp.moveaxis(split.swapaxes(-3, -2), -5, -2)  # (..., h, w, c, g, n/g)
    return ungrouped.reshape(*stack, h, w, c, n)
