"""The bijection between convolution kernels and matrices.

This is the only place that knows the order of the axes. For a kernel with height ``h``, width
``w``, ``c`` input channels per group, ``n`` output channels and ``g`` groups the matrix of each
group has one row for every pair (vertical tap, input channel) and one column for every pair
(horizontal tap, output channel of that group), so that its rank-K factors are themselves the
kernels of a vertical and of a horizontal convolution (Tai et al., 2016, arXiv 1511.06067, section
2.1). Kernels of other layouts, of one or of three spatial dimensions, or whose horizontal
convolution comes first are brought to (h, w, c, n) by `to_pair`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)  # what is given in NumPy is returned in NumPy

AXES = {1: "WIO", 2: "HWIO", 3: "DHWIO"}  # Flax's layout by the number of spatial dimensions


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
    convolution.

    Args:
        kernel: array whose last axes are those named; axes before them are a stack of kernels.
        axes: one letter for each axis, I for the input channels, O for the output channels, such as
            HWIO or OIHW.
        first: "vertical" if the first convolution runs along the first spatial axis, "horizontal"
            if along the others.

    Example:
        >>> import jax.numpy as jnp
        >>> to_pair(jnp.ones((8, 4, 3, 5)), "OIHW", "horizontal").shape
        (5, 3, 4, 8)
    """
    stack: int = kernel.ndim - len(axes)
    one, two = split_axes(axes, first)
    moved = kernel.transpose(_order(stack, axes, one + two + "IO"))
    sizes = dict(zip(axes, kernel.shape[stack:], strict=True))
    taps = [math.prod(sizes[letter] for letter in part) for part in (one, two)]
    return moved.reshape(*kernel.shape[:stack], *taps, *moved.shape[-2:])


def from_pair(factor: Array, axes: str, first: str, sizes: Mapping[str, int]) -> Array:
    """Brings (..., a, b, c, n) back to a layout; the inverse of `to_pair`.

    Args:
        factor: array of shape (..., a, b, c, n).
        axes, first: as in `to_pair`.
        sizes: spatial axis to its size; axes that are not named have size 1.
    """
    stack: int = factor.ndim - 4
    order = "".join(split_axes(axes, first)) + "IO"
    spatial = [sizes.get(letter, 1) for letter in order[:-2]]
    spread = factor.reshape(*factor.shape[:stack], *spatial, *factor.shape[-2:])
    return spread.transpose(_order(stack, order, axes))


def _order(stack: int, old: str, new: str) -> list[int]:
    """The permutation that brings the last axes from one order of their letters to another."""
    return [*range(stack), *(stack + old.index(letter) for letter in new)]


def split_axes(axes: str, first: str) -> tuple[str, str]:
    """The spatial axes of the first and of the second convolution.

    The vertical one has the first spatial axis, the horizontal one all the others (none in one
    dimension).
    """
    spatial = axes.replace("I", "").replace("O", "")
    if len(set(axes)) != len(axes) or len(spatial) != len(axes) - 2 or not spatial:
        raise ValueError(
            f"axes={axes!r} is not allowed; name every axis once, with I and O, such as 'HWIO' "
            "or 'OIHW'."
        )
    if first not in ("vertical", "horizontal"):
        raise ValueError(f"first={first!r} is not allowed; give 'vertical' or 'horizontal'.")
    return (spatial[:1], spatial[1:]) if first == "vertical" else (spatial[1:], spatial[:1])


def fit_axes(axes: str, ndim: int) -> str:
    """The layout of a kernel of fewer axes in the same order: WIO for three axes of HWIO.

    Kernels of more axes are stacks, of which the layout names the last axes.
    """
    spatial = [letter for letter in axes if letter not in "IO"]
    dropped = spatial[: max(len(axes) - ndim, 0)]
    return "".join(letter for letter in axes if letter not in dropped)


def split_options(
    size: tuple[int, ...], first: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the options of a convolution over the axes of its first and of its second factor.

    Args:
        size: of the kernel along each spatial axis.
        first: which factor comes first, as in `split_axes`.
        options: "padding" with (before, after) for each spatial axis, others with one int each.

    Returns:
        The options of each factor; an axis that it leaves alone has 1, or no padding.

    Example:
        >>> split_options((3, 3), "vertical", {"strides": (2, 1)})
        ({'strides': (2, 1)}, {'strides': (1, 1)})
    """
    vertical = [axis == 0 for axis in range(len(size))]
    horizontal = [not own for own in vertical]
    masks = (vertical, horizontal) if first == "vertical" else (horizontal, vertical)
    one, two = ({name: _own(name, mask, x) for name, x in options.items()} for mask in masks)
    return one, two


def _own(name: str, mask: Sequence[bool], values: Sequence[Any]) -> tuple[Any, ...]:
    other = (0, 0) if name == "padding" else 1
    return tuple(x if own else other for own, x in zip(mask, values, strict=True))
