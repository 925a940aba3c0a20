"""The forms in which two factors stand for a kernel: which axes each has, and its name in a tree.

A form is known by what comes first, such as "vertical". Every scheme registers its own forms, so
that trees, plans and programs know a scheme that is written elsewhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One way to divide the axes of a kernel between two factors.

    Attributes:
        keys: names of the first and of the second factor in a tree.
        split: function of the letters of the spatial axes; gives the letters of the first factor
            and those of the second.
        spatial: whether the kernel has spatial axes.
    """

    keys: tuple[str, str]
    split: Callable[[str], tuple[str, str]]
    spatial: bool = True


FORMS: dict[str, Form] = {}
SCHEMES: dict[str, type[Any]] = {}  # name of a form to the class of its scheme


def form_of(first: str) -> Form:
    """The form of a name.

    Raises:
        ValueError: the name is not known.

    Example:
        >>> import lowrank_jax
        >>> form_of("vertical").keys
        ('vertical', 'horizontal')
    """
    if first not in FORMS:
        known = ", ".join(map(repr, FORMS))
        raise ValueError(f"first={first!r} is not allowed; give one of {known}.")
    return FORMS[first]
