"""How the factors of a kernel stand in a tree: a dict of two arrays in the kernel's place.

The keys say which convolution comes first, and the layout where it is not Flax's: ``{"vertical",
"horizontal"}`` are of a kernel (h, w, in, out), ``{"vertical_OIHW", "horizontal_OIHW"}`` of one
(out, in, h, w). A factor is a kernel, too, and may stand decomposed itself: a dict in the place of
its array. So a tree needs nothing beside it to be run or to be multiplied back, and stays a tree of
plain arrays for every optimiser and every file format.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lowrank_jax.factorization.axes import (
    AXES,
    INPUTS,
    OUTPUTS,
    fit_axes,
    only,
    sizes_of,
    spatial_axes,
    width_of,
)
from lowrank_jax.factorization.forms import FORMS, KEY, form_of
from lowrank_jax.factorization.layout import Array

# A name of a factor may be followed by the kernel's layout.
_KEY = re.compile(rf"({KEY.pattern}?)(?:_([A-Z]+))?")


def factor_keys(first: str, axes: str, ndim: int) -> tuple[str, str]:
    """The keys of the two factors of a kernel with ``ndim`` stored axes.

    Example:
        >>> import lowrank_jax
        >>> factor_keys("vertical", "OIHW", 4)
        ('vertical_OIHW', 'horizontal_OIHW')
    """
    one, two = form_of(first).keys
    usual = axes == fit_axes(AXES[2], ndim)
    return (one, two) if usual else (f"{one}_{axes}", f"{two}_{axes}")


def held_keys(node: Mapping) -> tuple[str, str]:
    """The keys of the two factors in a node, the first factor's first.

    Example:
        >>> held_keys({"right_factor_IO": np.ones((2, 8)), "left_factor_IO": np.ones((4, 2))})
        ('left_factor_IO', 'right_factor_IO')
    """
    order = _order(node)
    assert order is not None, "is_factors says so"
    return order[:2]


def is_factor_key(key: str) -> bool:
    """Whether a key of a tree names a factor."""
    match = _KEY.fullmatch(key)
    return match is not None and any(match[1] in form.keys for form in FORMS.values())


def is_factors(node: Any) -> bool:
    """Whether a node of a tree stands for a kernel.

    Example:
        >>> is_factors({"vertical": np.ones((3, 1, 4, 2)), "horizontal": np.ones((1, 3, 2, 8))})
        True
        >>> is_factors({"vertical": np.ones(3), "horizontal": np.ones(3)})
        False
    """
    if not isinstance(node, Mapping) or (order := _order(node)) is None:
        return False
    one, two = (shape_of(node[key]) for key in order[:2])
    if len(one) != len(two) or len(one) < 2 + FORMS[order[2]].spatial:
        return False
    others = set(node) - set(order[:2])
    # Other modules have such names, too. A bias beside what fits is refused by `read_factors`.
    fit = others == {"bias"} and fit_together(one, two, order[3] or fit_axes(AXES[2], len(one)))
    return not others or fit


def is_pair(node: Any) -> bool:
    """Whether a node stands for a kernel by two arrays, neither of which is decomposed itself.

    Example:
        >>> core, last = np.ones((3, 3, 2, 2)), np.ones((1, 1, 2, 8))
        >>> pair = {"spatial_first": core, "pointwise_second": last}
        >>> nested = {"pointwise_first": np.ones((1, 1, 4, 2)), "spatial_second": pair}
        >>> is_pair(pair), is_pair(nested), is_factors(nested)
        (True, False, True)
    """
    return is_factors(node) and not any(map(is_factors, node.values()))


def shape_of(factor: Any) -> tuple[int, ...]:
    """The shape of an array, or of the kernel that factors stand for; () of anything else."""
    order = _order(factor) if is_factors(factor) else None
    if order is None:
        return tuple(np.shape(factor)) if hasattr(factor, "shape") else ()
    one, two = (shape_of(factor[key]) for key in order[:2])
    axes = order[3] or fit_axes(AXES[2], len(one))
    return dense_shape(one, two, axes) if len(axes) <= len(one) else ()


def _order(node: Mapping) -> tuple[str, str, str, str] | None:
    """The first key, the second, which convolution comes first, and the layout if it is named."""
    if not all(isinstance(key, str) for key in node):
        return None
    found = {
        match[1]: (key, match[2] or "")
        for key in filter(is_factor_key, node)
        if (match := _KEY.fullmatch(key))
    }
    for first, form in FORMS.items():
        if set(found) == set(form.keys):
            (one, axes), (two, same) = (found[name] for name in form.keys)
            return (one, two, first, axes) if axes == same else None
    return None


def read_factors(node: Mapping, path: str) -> tuple[tuple[Any, Any], str, str]:
    """The two factors of a node, its layout, and which convolution comes first.

    A factor is an array, or the node of its own factors.

    Raises:
        ValueError: the arrays are not the factors of one kernel.
    """
    order = _order(node)
    assert order is not None, "is_factors says so"
    one, two, first, axes = order
    if "bias" in node:
        raise ValueError(
            f"{path}: beside the factors {one!r} and {two!r} there is 'bias'; a bias stands beside "
            "the kernel, whose place the factors take. Move it there."
        )
    pair = _unboxed(node[one]), _unboxed(node[two])
    axes = axes or fit_axes(AXES[2], len(shape_of(pair[0])))
    _check(path, pair, axes)
    return pair, axes, first


def _unboxed(factor: Any) -> Any:
    """The array in a variable of NNX."""
    return factor if is_factors(factor) else jax.tree.leaves(factor)[0]


def _check(path: str, pair: tuple[Any, Any], axes: str) -> None:
    shapes = [shape_of(factor) for factor in pair]
    if not fit_together(shapes[0], shapes[1], axes):
        raise ValueError(
            f"{path}: factors of shapes {shapes[0]} and {shapes[1]} do not fit together in the "
            "layout "
            f"{axes}: one of them has the taps of each spatial axis and the other size 1, and the "
            "outputs of the first are the inputs of the second, times the groups. Decompose the "
            "parameters of this very model."
        )
    types = [np.dtype(factor.dtype) for factor in jax.tree.leaves(pair)]
    if not all(jax.numpy.issubdtype(dtype, jax.numpy.floating) for dtype in types):
        raise ValueError(
            f"{path}: factors of types {' and '.join(map(str, types))} are not allowed; give "
            "floating-point arrays, as decompose makes them."
        )


def why_not_floating(dtype: Any) -> str:
    """Why kernels of a type cannot be decomposed; "" if they can.

    Example:
        >>> why_not_floating("int8")
        'the kernel has type int8; allowed are float16, bfloat16, float32 and float64'
    """
    if jax.numpy.issubdtype(dtype, jax.numpy.floating) and 1 < np.dtype(dtype).itemsize <= 8:
        return ""
    allowed = "allowed are float16, bfloat16, float32 and float64"
    is_key = jax.numpy.issubdtype(dtype, jax.dtypes.extended)  # of random numbers
    return f"the kernel has type {dtype if is_key else np.dtype(dtype)}; {allowed}"


def as_kernel(kernel: Any, where: str) -> Any:
    """An array of floating-point numbers in the byte order of the machine.

    Raises:
        ValueError: the kernel is no array, or holds integers or floats of one byte.
    """
    if isinstance(kernel, list | tuple):
        kernel = np.asarray(kernel, np.float32)
    check_array(kernel, where)
    check_floating(kernel.dtype, where)
    if isinstance(kernel, np.ndarray):
        return kernel.astype(kernel.dtype.newbyteorder("="), copy=False)
    return kernel


def wide(x: Array) -> Array:
    """An array in float32 or wider.

    Example:
        >>> wide(np.ones(2, np.float16)).dtype, wide(np.ones(2)).dtype
        (dtype('float32'), dtype('float64'))
    """
    return x.astype(jax.numpy.promote_types(x.dtype, np.float32))


def check_array(kernel: Any, where: str) -> None:
    """Refuses what has no shape and no type.

    Raises:
        ValueError: the kernel lacks a shape or a type.
    """
    if not hasattr(kernel, "shape") or not hasattr(kernel, "dtype"):
        raise ValueError(f"{where}: the kernel is a {type(kernel).__name__}; give an array.")


def check_floating(dtype: Any, where: str) -> None:
    """Refuses a kernel of integers or of a floating type of one byte.

    Raises:
        ValueError: the kernel has such a type.
    """
    if reason := why_not_floating(dtype):
        remedy = "Convert the kernel first, with its scale if it is quantised."
        raise ValueError(f"{where}: {reason}. {remedy}")


def fit_together(one: Sequence[int], two: Sequence[int], axes: str) -> bool:
    """Whether arrays of two shapes are the factors of one kernel."""
    if len(one) != len(two) or len(one) < len(axes) or 0 in (*one, *two):
        return False
    stack = len(one) - len(axes)
    sizes, others = (sizes_of(axes, shape) for shape in (one, two))
    groups, rest = divmod(sizes["O"], others["I"])
    outputs = width_of(axes, two)
    fits = groups >= 1 and rest == 0 and outputs % max(groups, 1) == 0
    return fits and _share(sizes, others, axes) and tuple(one[:stack]) == tuple(two[:stack])


def _share(one: Mapping[str, int], two: Mapping[str, int], axes: str) -> bool:
    """Whether each axis but that of the channels between the factors belongs to one of them."""
    taps = all(1 in (one[letter], two[letter]) for letter in spatial_axes(axes))
    inputs = all(two[letter] == 1 for letter in only(axes, INPUTS) if letter != "I")
    return taps and inputs and all(one[x] == 1 for x in only(axes, OUTPUTS) if x != "O")


def dense_shape(one: Sequence[int], two: Sequence[int], axes: str) -> tuple[int, ...]:
    """The shape of the kernel that two factors stand for.

    Example:
        >>> dense_shape((5, 1, 3, 10), (1, 5, 10, 192), "HWIO")
        (5, 5, 3, 192)
    """
    stack = len(one) - len(axes)
    pairs = zip(axes, one[stack:], two[stack:], strict=True)
    channels = {"I": lambda a, b: a, "O": lambda a, b: b}
    sizes = [channels.get(letter, max)(a, b) for letter, a, b in pairs]
    return (*one[:stack], *sizes)
