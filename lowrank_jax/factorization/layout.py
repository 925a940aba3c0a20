"""The bijection between convolution kernels and matrices.

For a kernel with height ``h``, width ``w``, ``c`` input channels per group, ``n`` output channels
and ``g`` groups the matrix of each group has one row for every pair (vertical tap, input channel)
and one column for every pair (horizontal tap, output channel of that group), so that its rank-K
factors are themselves the kernels of a vertical and of a horizontal convolution (Tai et al., 2016,
arXiv 1511.06067, section 2.1). Kernels of other layouts, of one or of three spatial dimensions, or
whose horizontal convolution comes first are brought to (h, w, c, n) by `to_pair`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np

from lowrank_jax.factorization.axes import INPUTS, OUTPUTS, only, sizes_of, split_axes

Array = TypeVar("Array", jax.Array, np.ndarray)  # what is given in NumPy is returned in NumPy


def to_matrix(kernel: Array, groups: int = 1) -> Array:
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
    order = [
        *range(len(stack)),
        *(len(stack) + axis for axis in (3, 0, 2, 1, 4)),
    ]  # (..., g, h, c, w, n/g)
    return split.transpose(order).reshape(*stack, groups, h * c, w * (n // groups))


def from_matrix(matrix: Array, shape: tuple[int, int, int, int]) -> Array:
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
    order = [
        *range(len(stack)),
        *(len(stack) + axis for axis in (1, 3, 2, 0, 4)),
    ]  # (..., h, w, c, g, n/g)
    return split.transpose(order).reshape(*stack, h, w, c, n)


def to_pair(kernel: Array, axes: str, first: str) -> Array:
    """Brings a kernel of any layout to (..., a, b, c, n): taps of the first and of the second
    convolution, channels.

    Args:
        kernel: array whose last axes are those named; axes before them are a stack of kernels.
        axes: one letter for each axis, such as HWIO or OIHW; see `INPUTS` and `OUTPUTS`.
        first: name of a form, such as "vertical" if the first convolution runs along the first
            spatial axis.

    Example:
        >>> import jax.numpy as jnp
        >>> to_pair(jnp.ones((8, 4, 3, 5)), "OIHW", "horizontal").shape
        (5, 3, 4, 8)
    """
    return merged(kernel, axes, _parts(axes, first))


def from_pair(factor: Array, axes: str, first: str, sizes: Mapping[str, int]) -> Array:
    """Brings (..., a, b, c, n) back to a layout; the inverse of `to_pair`.

    Args:
        factor: array of shape (..., a, b, c, n).
        axes, first: as in `to_pair`.
        sizes: letter of an axis to its size. Where I and O are not named, they have what is left;
            other axes that are not named have size 1.
    """
    own = dict.fromkeys(axes, 1) | dict(sizes)
    for letter, group, size in zip("IO", (INPUTS, OUTPUTS), factor.shape[-2:], strict=True):
        own[letter] = size // math.prod(own[x] for x in axes if x in group and x != letter)
    return parted(factor, axes, _parts(axes, first), own)


def merged(kernel: Array, axes: str, parts: Sequence[str]) -> Array:
    """Brings the last axes of a kernel into the order of some parts, one axis for each of them.

    Example:
        >>> import jax.numpy as jnp
        >>> merged(jnp.ones((8, 4, 3, 5)), "OIHW", ["HW", "I", "O"]).shape
        (15, 4, 8)
    """
    stack: int = kernel.ndim - len(axes)
    sizes = sizes_of(axes, kernel.shape)
    moved = kernel.transpose(_order(stack, axes, "".join(parts)))
    whole = [math.prod(sizes[letter] for letter in part) for part in parts]
    return moved.reshape(*kernel.shape[:stack], *whole)


def parted(array: Array, axes: str, parts: Sequence[str], sizes: Mapping[str, int]) -> Array:
    """Brings an array with one axis for each part back to a layout; the inverse of `merged`."""
    stack, order = array.ndim - len(parts), "".join(parts)
    spread = array.reshape(*array.shape[:stack], *(sizes[letter] for letter in order))
    return spread.transpose(_order(stack, order, axes))


def _parts(axes: str, first: str) -> tuple[str, str, str, str]:
    """The letters of the taps of both factors, of the inputs and of the outputs."""
    return *split_axes(axes, first), only(axes, INPUTS), only(axes, OUTPUTS)


def _order(stack: int, old: str, new: str) -> list[int]:
    """The permutation that brings the last axes from one order of their letters to another."""
    return [*range(stack), *(stack + old.index(letter) for letter in new)]
