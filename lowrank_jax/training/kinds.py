"""What kind of number a value is."""

import math
import numbers
from typing import Any

import jax
import numpy as np


def is_int(value: Any) -> bool:
    """Whether a value is an int, of Python or of NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python, NumPy or JAX."""
    return isinstance(value, numbers.Real) or (isinstance(value, jax.Array) and value.ndim == 0)


def is_above_zero(value: Any) -> bool:
    """Whether a value is a number above 0, and not infinite.

    Example:
        >>> is_above_zero(0.1), is_above_zero(math.inf), is_above_zero("0.1")
        (True, False, False)
    """
    return is_number(value) and 0 < value < math.inf
