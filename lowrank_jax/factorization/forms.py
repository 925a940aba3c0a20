"""The forms in which two factors stand for a kernel: which axes each has, and its name in a tree.

A form is known by what comes first, such as "vertical". Every scheme registers its own forms, so
that trees, plans and programs know a scheme that is written elsewhere.
"""

import dataclasses
import re
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


KEY = re.compile("[a-z_]+")  # what a factor is called in a tree; capitals name a layout
FORMS: dict[str, Form] = {}
SCHEMES: dict[str, type[Any]] = {}  # name of a form to the class of its scheme


def check_form(name: str, form: Form, scheme: str) -> None:
    """Refuses a form that would take the place of another one, or that trees would not know again.

    Args:
        name: of the form.
        form: that a scheme registers.
        scheme: name of its class, which may be defined again, as in a notebook.

    Raises:
        ValueError: the name, or its pair of keys, belongs to another scheme, or a key is not of
            small letters and underscores.
    """
    if bad := [key for key in form.keys if not KEY.fullmatch(key)]:
        raise ValueError(
            f"{scheme}: the key {bad[0]!r} of the form {name!r} is not allowed; give small letters "
            "and underscores alone, such as 'first_half'."
        )
    taken = [own for own in FORMS if own == name or set(FORMS[own].keys) == set(form.keys)]
    if others := [own for own in taken if SCHEMES[own].__qualname__ != scheme]:
        raise ValueError(
            f"{scheme}: the form {name!r} with the keys {form.keys} would replace {others[0]!r} of "
            f"{SCHEMES[others[0]].__qualname__}; give other names."
        )


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
        raise ValueError(
            f"first={first!r} is not allowed; give one of {known}, or import the module that "
            "defines the scheme."
        )
    return FORMS[first]
