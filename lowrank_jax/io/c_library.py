"""The C library of this process, whose allocator some callers adjust."""

import ctypes
from typing import Any


def c_library() -> Any:
    """The library, whose functions are attributes; None on Windows, which has none of a process.

    Example:
        >>> hasattr(c_library(), "there_is_no_such_function")
        False
    """
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
