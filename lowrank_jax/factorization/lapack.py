"""Routines of the BLAS and LAPACK that SciPy carries, called without Python's lock, so that threads
run side by side.

SciPy's own wrappers hold the lock; the pointers that it gives to Cython (`scipy.linalg.cython_blas`
and `cython_lapack`) do not need it. NumPy has another copy of the library, whose idle threads would
hold the cores.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

_pointer, _name = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_GetName
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]


@functools.cache
def routine(name: str, dtype: np.dtype) -> Callable[..., None]:
    """A routine for float32 or float64 arrays, by its name without the letter of the type.

    The function takes what Fortran's does: str for a character, int, float for a scalar of the
    type, and arrays, which must be laid out as the routine expects and are changed in place. It
    checks the number of arguments alone.

    Example:
        >>> a, b, c = np.full((2, 2), 2.0), np.eye(2), np.empty((2, 2))
        >>> routine("gemm", np.dtype("float64"))("N", "N", 2, 2, 2, 1.0, a, 2, b, 2, 0.0, c, 2)
        >>> c.tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    double = dtype == np.float64
    full = ("d" if double else "s") + name
    table = (
        cython_blas.__pyx_capi__ if full in cython_blas.__pyx_capi__ else cython_lapack.__pyx_capi__
    )
    signature = _name(table[full])
    count = signature.count(b",") + 1
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(_pointer(table[full], signature))
    scalar = ctypes.c_double if double else ctypes.c_float

    def call(*args: np.ndarray | str | int | float) -> None:
        if len(args) != count:
            raise TypeError(f"{full} takes {count} arguments, not {len(args)}.")
        boxes = [
            None if isinstance(arg, np.ndarray) else _box(arg, scalar) for arg in args
        ]  # live until it returns
        function(*map(_address, args, boxes))

    return call


def _address(arg: Any, box: "ctypes._SimpleCData | None") -> int:
    return arg.ctypes.data if box is None else ctypes.addressof(box)


def _box(value: Any, scalar: type) -> "ctypes._SimpleCData":
    if isinstance(value, str):
        return ctypes.c_char(value.encode())
    return scalar(value) if isinstance(value, float) else ctypes.c_int(value)
