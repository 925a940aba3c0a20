"""The ranks that the matrices of a kernel can have."""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence

from lowrank_jax.factorization.axes import OUTPUTS, own_letters, sizes_of, split_axes


def max_rank(
    shape: Sequence[int], groups: int = 1, axes: str = "HWIO", first: str = "vertical"
) -> int:
    """The largest useful rank of a kernel: the rank at which the factors reproduce the kernel.

    Args:
        shape: kernel shape (..., h, w, c, n), with c input channels per group.
        groups: number of feature groups.
        axes, first: as in `Separable`.

    Returns:
        The smaller side of the matrix of one group, such as min(h * c, w * n / groups).

    Raises:
        ValueError: the shape has fewer axes than the layout, the layout or the form is not known,
            or the groups do not divide the outputs.

    Example:
        >>> max_rank((5, 5, 96, 192))
        480
    """
    split_axes(axes, first)
    sizes = checked_sizes(axes, shape, "max_rank")
    check_groups(groups, sizes, axes, "max_rank")
    rows, columns = (
        math.prod(sizes[letter] for letter in own_letters(axes, first, i)) for i in (0, 1)
    )
    return int(min(rows, columns // groups))


def checked_sizes(axes: str, shape: Sequence[int], where: str) -> dict[str, int]:
    """Letter of each axis of a kernel to its size.

    Raises:
        ValueError: the shape has fewer axes than the layout.
    """
    if len(shape) < len(axes):
        raise ValueError(
            f"{where}: a kernel of shape {tuple(shape)} has fewer axes than {axes=}; give its "
            "whole shape, or the layout of its own axes."
        )
    return sizes_of(axes, shape)


def check_groups(groups: object, sizes: Mapping[str, int], axes: str, where: str) -> None:
    """Refuses groups that do not divide the first axis of the outputs.

    Raises:
        ValueError: the groups are no int of 1 or more, or do not divide these outputs.
    """
    outputs = sizes[next(letter for letter in axes if letter in OUTPUTS)]
    if not isinstance(groups, numbers.Integral) or groups < 1 or outputs % groups:
        raise ValueError(
            f"{where}: {groups=} is not allowed; give an int of 1 or more that divides the "
            f"{outputs} outputs."
        )


def check_rank(rank: object, limit: int, where: str, shape: Sequence[int], groups: int) -> int:
    """Returns the rank as an int, or raises an error that names where it was given.

    Raises:
        ValueError: the rank is no int from 1 to ``limit``.
    """
    try:
        value = 0 if isinstance(rank, bool) else operator.index(rank)  # type: ignore[arg-type]
    except TypeError:
        value = 0
    if not 1 <= value <= limit:
        raise ValueError(
            f"{where}: rank {rank!r} is not allowed; give an int from 1 to {limit}, the smaller "
            "side of the "
            f"matrix of one of the {groups} group(s) of the kernel {tuple(shape)}."
        )
    return value
