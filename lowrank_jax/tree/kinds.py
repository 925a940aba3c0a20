"""What kind of number a value is, and the refusal of what is of another kind or not read."""

import math
import numbers
import operator
from typing import Any

import jax
import numpy as np


def is_int(value: Any) -> bool:
    """Whether a value is an int, of Python or of NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python, NumPy or JAX."""
    array = isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
    return isinstance(value, numbers.Real) or array


def is_above_zero(value: Any) -> bool:
    """Whether a value is a number above 0, and not infinite.

    Example:
        >>> is_above_zero(0.1), is_above_zero(math.inf), is_above_zero("0.1")
        (True, False, False)
    """
    return is_number(value) and 0 < value < math.inf


def whole(name: str, value: Any, least: int = 1) -> int:
    """The value of an argument, if it is an int that is large enough.

    Raises:
        ValueError: the value is no int, or is below ``least``.
    """
    try:
        found = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = least - 1
    if found < least:
        raise ValueError(f"{name}={value!r} is not allowed; give an int of {least} or more.")
    return found


def check_unread(why: str, **given: tuple[Any, Any]) -> None:
    """Refuses arguments that nothing reads.

    Args:
        why: they are not read, and what to do, for the message.
        **given: argument to its value, and to its usual one.

    Raises:
        ValueError: such an argument has another value than usual.
    """
    for name, (value, usual) in given.items():
        if value != usual:
            raise ValueError(f"{name}={value!r:.80} is {why}")
