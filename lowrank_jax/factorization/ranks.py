"""The ranks that the matrices of a kernel can have."""

import math
import operator
from collections.abc import Sequence

from lowrank_jax.factorization.axes import own_letters, sizes_of


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
        ValueError: the shape has fewer axes than the layout, or the layout or the form is not
            known.

    Example:
        >>> max_rank((5, 5, 96, 192))
        480
    """
    if len(shape) < len(axes):
        raise ValueError(
            f"max_rank: a kernel of shape {tuple(shape)} has fewer axes than {axes=}; give its "
            "whole shape."
        )
    sizes = sizes_of(axes, shape)
    rows, columns = (
        math.prod(sizes[letter] for letter in own_letters(axes, first, i)) for i in (0, 1)
    )
    return int(min(rows, columns // groups))


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
