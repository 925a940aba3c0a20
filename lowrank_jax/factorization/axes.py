"""The axes of a kernel, one letter each, and how the factors divide them.

I and O are the channels of a convolution, all other letters its taps. A product may have several
axes of inputs and of outputs. Kernels that have axes before those named are stacks.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.factorization.forms import FORMS, form_of

AXES = {1: "WIO", 2: "HWIO", 3: "DHWIO"}  # Flax's layout by the number of spatial dimensions
INPUTS, OUTPUTS = "IJKL", "OPQR"  # letters of the channels; a product may have several of each


def sizes_of(axes: str, shape: Sequence[int]) -> dict[str, int]:
    """Letter of each axis of a kernel to its size; axes before those named are a stack.

    Example:
        >>> import lowrank_jax
        >>> sizes_of("IO", (12, 4, 8))
        {'I': 4, 'O': 8}
    """
    return dict(zip(axes, shape[len(shape) - len(axes) :], strict=True))


def kernel_size(axes: str, shape: Sequence[int]) -> int:
    """Weights of one kernel; axes before those named are a stack.

    Example:
        >>> import lowrank_jax
        >>> kernel_size("IO", (12, 4, 8))
        32
    """
    return math.prod(sizes_of(axes, shape).values())


def width_of(axes: str, shape: Sequence[int]) -> int:
    """Outputs of one kernel, of all groups; axes before those named are a stack.

    Example:
        >>> import lowrank_jax
        >>> width_of("IPO", (12, 4, 8))
        32
    """
    sizes = sizes_of(axes, shape)
    return math.prod(sizes[letter] for letter in only(axes, OUTPUTS))


def spatial_axes(axes: str) -> str:
    """The letters of the spatial axes, in their order."""
    return "".join(letter for letter in axes if letter not in INPUTS + OUTPUTS)


def only(axes: str, letters: str) -> str:
    """The axes that are among some letters, in the order of the axes."""
    return "".join(letter for letter in axes if letter in letters)


def patch_axes(axes: str, first: str) -> tuple[str, str]:
    """The axes of a patch as they are stored, and with the taps of the second factor outermost.

    Example:
        >>> import lowrank_jax
        >>> patch_axes("OIHW", "vertical")
        ('IHW', 'WHI')
    """
    one, two = split_axes(axes, first)
    stored = "".join(letter for letter in axes if letter not in OUTPUTS)
    return stored, two + one + only(axes, INPUTS)


def own_letters(axes: str, first: str, index: int) -> str:
    """The letters of the axes that a factor shares with its kernel.

    Example:
        >>> import lowrank_jax
        >>> own_letters("HWIO", "vertical", 0), own_letters("HWIO", "vertical", 1)
        ('HI', 'WO')
    """
    return split_axes(axes, first)[index] + only(axes, (INPUTS, OUTPUTS)[index])


def split_axes(axes: str, first: str) -> tuple[str, str]:
    """The spatial axes of the first and of the second factor, by the form of this name.

    Raises:
        ValueError: the layout has no such axes, or the form is not known.
    """
    spatial = spatial_axes(axes)
    form = form_of(first)
    whole = len(set(axes)) == len(axes) and {"I", "O"} <= set(axes)
    if not whole or bool(spatial) != form.spatial or (spatial and len(axes) != len(spatial) + 2):
        fitting = "'HWIO' or 'OIHW'" if form.spatial else "'IO', or 'IPO' for heads of outputs"
        raise ValueError(
            f"axes={axes!r} is not allowed; name every axis once, with I and O, such as {fitting}."
        )
    return form.split(spatial)


def forms_of(axes: str, shape: Sequence[int]) -> tuple[str, ...]:
    """Names of the forms in which two factors may stand for a kernel, the usual one first.

    Forms that would be the same product are named once.

    Example:
        >>> import lowrank_jax
        >>> forms_of("HWIO", (3, 3, 8, 8)), forms_of("IPO", (8, 2, 4))
        (('vertical', 'horizontal', 'spatial', 'pointwise'), ('left', 'heads'))
    """
    if not spatial_axes(axes):
        return ("left", "heads") if heads_of(axes, shape) > 1 else ("left",)
    names = [first for first, form in FORMS.items() if form.spatial]
    return tuple(dict.fromkeys(same_form(axes, shape, first) for first in names))


def same_form(axes: str, shape: Sequence[int], first: str) -> str:
    """The first form that computes the same product; with a single tap all forms do.

    Example:
        >>> import lowrank_jax
        >>> same_form("HWIO", (1, 1, 8, 8), "pointwise"), same_form("WIO", (3, 8, 8), "spatial")
        ('vertical', 'vertical')
    """
    if not form_of(first).spatial:
        return first
    sizes = sizes_of(axes, shape)

    def parts(name: str) -> list[list[str]]:
        return [[x for x in part if sizes[x] > 1] for part in split_axes(axes, name)]

    return next(name for name in FORMS if FORMS[name].spatial and parts(name) == parts(first))


def heads_of(axes: str, shape: Sequence[int]) -> int:
    """The size of the first output axis of a product with several output axes, else 1."""
    outputs = only(axes, OUTPUTS)
    return shape[len(shape) - len(axes) + axes.index(outputs[0])] if len(outputs) > 1 else 1


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
        first: name of the form, as in `split_axes`.
        options: "padding" with (before, after) for each spatial axis, others with one int each.

    Returns:
        The options of each factor. Along an axis that the factor leaves alone they are 1, or no
        padding.

    Example:
        >>> import lowrank_jax
        >>> split_options((3, 3), "vertical", {"strides": (2, 1)})
        ({'strides': (2, 1)}, {'strides': (1, 1)})
    """
    spatial = AXES[len(size)][:-2]
    masks = [[x in part for x in spatial] for part in form_of(first).split(spatial)]
    one, two = ({name: _own(name, mask, x) for name, x in options.items()} for mask in masks)
    return one, two


def _own(name: str, mask: Sequence[bool], values: Sequence[Any]) -> tuple[Any, ...]:
    other = (0, 0) if name == "padding" else 1
    return tuple(x if own else other for own, x in zip(mask, values, strict=True))
