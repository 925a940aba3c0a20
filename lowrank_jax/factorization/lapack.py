"""Routines of the BLAS and LAPACK that SciPy carries, called without Python's lock.

Without the lock threads run side by side. SciPy's own wrappers hold it. The pointers that SciPy
gives to Cython (`scipy.linalg.cython_blas` and `cython_lapack`) do not need it. NumPy has another
copy of the library, whose idle threads would hold the cores.

Fortran trusts its caller: an array that is too small or of another type is read and written beyond
its end. So each routine has a function here with Fortran's names, which says what every array must
be. A call is made only after all of them were checked.
"""

import ctypes
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import cython_blas, cython_lapack

_pointer, _name = ctypes.pythonapi.PyCapsule_GetPointer, ctypes.pythonapi.PyCapsule_GetName
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]


class Need(NamedTuple):
    """What a routine needs of one array.

    Attributes:
        name: Fortran's name of the argument.
        rows, columns: of the matrix. A vector has one column.
        step: the leading dimension, elements from one column to the next. None for a vector.
        written: whether the routine writes to the array.
        integer: whether the elements are C ints, not numbers of the routine's type.
    """

    name: str
    rows: int
    columns: int = 1
    step: int | None = None
    written: bool = False
    integer: bool = False


@functools.cache
def routine(name: str, dtype: np.dtype) -> Callable[..., None]:
    """A routine for float32 or float64 arrays, by its name without the letter of the type.

    The function takes what Fortran's does: str for a character, int, float for a scalar of the
    type, and arrays. Matrices lie column by column, and the routine changes some of them in place.

    Args:
        name: one of "gemm", "ormqr", "potrf", "potrs", "stein", "sterf", "syrk", "sytrd" and
            "trtrs".
        dtype: of the arrays.

    Raises:
        TypeError: when called, if an argument is of another type.
        ValueError: the routine is not known, or the type is neither float32 nor float64. When
            called, if an array is not contiguous, read-only though the routine writes to it, in
            row order though the routine reads columns, or too small.

    Example:
        >>> a, b, c = np.full((2, 2), 2.0), np.eye(2), np.empty((2, 2), order="F")
        >>> routine("gemm", np.dtype("float64"))("N", "N", 2, 2, 2, 1.0, a, 2, b, 2, 0.0, c, 2)
        >>> c.tolist()
        [[2.0, 2.0], [2.0, 2.0]]
    """
    dtype = np.dtype(dtype)
    if name not in _NEEDS or dtype not in _LETTERS:
        known = f"one of {', '.join(sorted(_NEEDS))} for float32 or float64"
        raise ValueError(f"routine({name!r}, {dtype}) is not known; give {known}.")
    full = _LETTERS[dtype] + name
    scalar = ctypes.c_double if dtype == np.float64 else ctypes.c_float
    function, check = _function(full), functools.partial(_check, full, _NEEDS[name], dtype)

    def call(*args: np.ndarray | str | int | float) -> None:
        check(args)
        boxes = [None if isinstance(arg, np.ndarray) else _box(arg, scalar) for arg in args]
        function(*map(_address, args, boxes))  # the boxes live until it returns

    return call


def _function(full: str) -> Callable[..., None]:
    blas, lapack = cython_blas.__pyx_capi__, cython_lapack.__pyx_capi__
    capsule = blas[full] if full in blas else lapack[full]
    signature = _name(capsule)
    count = signature.count(b",") + 1
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(_pointer(capsule, signature))


def _address(arg: Any, box: "ctypes._SimpleCData | None") -> int:
    return arg.ctypes.data if box is None else ctypes.addressof(box)


def _box(value: Any, scalar: type) -> "ctypes._SimpleCData":
    if isinstance(value, str):
        return ctypes.c_char(value.encode())
    return scalar(value) if isinstance(value, float) else ctypes.c_int(value)


def _check(full: str, needs: Callable, dtype: np.dtype, args: tuple) -> None:
    """Raises TypeError or ValueError if an argument is not what the routine takes."""
    parameters = inspect.signature(needs).parameters
    if len(args) != len(parameters):
        raise TypeError(f"{full}: {len(args)} arguments are not allowed; give {len(parameters)}.")
    named = dict(zip(parameters, args, strict=True))
    for name, parameter in parameters.items():
        _check_kind(full, name, named[name], parameter.annotation)
    for need in needs(*args):
        _check_array(full, need, named[need.name], np.dtype(np.intc) if need.integer else dtype)


def _check_kind(full: str, name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{full}: {name}={value!r} is not allowed; give {kind.__name__}.")
    if kind is str and value not in _CHARACTERS[name]:
        raise ValueError(
            f"{full}: {name}={value!r} is not allowed; give one of {_CHARACTERS[name]}."
        )
    if kind is int and not 0 <= value < 2**31:
        raise ValueError(f"{full}: {name}={value!r} is not allowed; give 0 to {2**31 - 1}.")


def _check_array(full: str, need: Need, array: np.ndarray, dtype: np.dtype) -> None:
    what = f"{full}: the array {need.name}"
    if array.dtype != dtype:
        raise TypeError(f"{what} has the type {array.dtype}; give {dtype}.")
    if not (array.flags.c_contiguous or array.flags.f_contiguous) or not array.flags.aligned:
        raise ValueError(f"{what} has gaps between its elements; give a contiguous copy of it.")
    if need.written and not array.flags.writeable:
        raise ValueError(f"{what} is read-only, and the routine writes to it; give a copy of it.")
    least = need.rows
    if need.step is not None:
        _check_step(what, need, array)
        least = need.step * (need.columns - 1) + need.rows if need.columns and need.rows else 0
    if array.size < least:
        raise ValueError(f"{what} has {array.size} elements; the routine needs {least}.")


def _check_step(what: str, need: Need, array: np.ndarray) -> None:
    """Raises ValueError if the columns of a matrix are not where the leading dimension says."""
    step = need.step or 0
    if step < max(1, need.rows):
        raise ValueError(
            f"{what} has the leading dimension {step}; give {max(1, need.rows)} or more."
        )
    if array.ndim < 2:
        return
    if need.written and not array.flags.f_contiguous:
        raise ValueError(f"{what} lies row by row; give it in Fortran's order.")
    orders = (array.flags.f_contiguous, array.flags.c_contiguous)
    steps = [max(1, size) for size, own in zip(array.shape, orders, strict=False) if own]
    if array.ndim > 2 or step not in steps:
        raise ValueError(
            f"{what} of shape {array.shape} does not have the leading dimension {step}; give a "
            f"matrix, and the length of its columns, or of its rows if it lies row by row: {steps}."
        )


def _gemm(
    transa: str, transb: str, m: int, n: int, k: int, alpha: float, a: np.ndarray, lda: int,
    b: np.ndarray, ldb: int, beta: float, c: np.ndarray, ldc: int,
) -> Iterator[Need]:  # fmt: skip
    """C = alpha A B + beta C."""
    yield Need("a", *((m, k) if transa == "N" else (k, m)), lda)
    yield Need("b", *((k, n) if transb == "N" else (n, k)), ldb)
    yield Need("c", m, n, ldc, written=True)


def _syrk(
    uplo: str, trans: str, n: int, k: int, alpha: float, a: np.ndarray, lda: int, beta: float,
    c: np.ndarray, ldc: int,
) -> Iterator[Need]:  # fmt: skip
    """One triangle of C = alpha A A^T + beta C."""
    yield Need("a", *((n, k) if trans == "N" else (k, n)), lda)
    yield Need("c", n, n, ldc, written=True)


def _sytrd(
    uplo: str, n: int, a: np.ndarray, lda: int, d: np.ndarray, e: np.ndarray, tau: np.ndarray,
    work: np.ndarray, lwork: int, info: np.ndarray,
) -> Iterator[Need]:  # fmt: skip
    """A symmetric matrix to tridiagonal form."""
    yield Need("a", n, n, lda, written=True)
    yield Need("d", n, written=True)
    yield Need("e", max(0, n - 1), written=True)
    yield Need("tau", max(0, n - 1), written=True)
    yield Need("work", max(1, lwork), written=True)
    yield Need("info", 1, written=True, integer=True)


def _sterf(n: int, d: np.ndarray, e: np.ndarray, info: np.ndarray) -> Iterator[Need]:
    """All eigenvalues of a tridiagonal matrix."""
    yield Need("d", n, written=True)
    yield Need("e", max(0, n - 1), written=True)
    yield Need("info", 1, written=True, integer=True)


def _stein(
    n: int, d: np.ndarray, e: np.ndarray, m: int, w: np.ndarray, iblock: np.ndarray,
    isplit: np.ndarray, z: np.ndarray, ldz: int, work: np.ndarray, iwork: np.ndarray,
    ifail: np.ndarray, info: np.ndarray,
) -> Iterator[Need]:  # fmt: skip
    """Eigenvectors of a tridiagonal matrix to eigenvalues that are known."""
    yield Need("d", n)
    yield Need("e", max(0, n - 1))
    yield Need("w", m)
    yield Need("iblock", m, integer=True)
    yield Need("isplit", n, integer=True)
    yield Need("z", n, m, ldz, written=True)
    yield Need("work", 5 * n, written=True)
    yield Need("iwork", n, written=True, integer=True)
    yield Need("ifail", m, written=True, integer=True)
    yield Need("info", 1, written=True, integer=True)


def _ormqr(
    side: str, trans: str, m: int, n: int, k: int, a: np.ndarray, lda: int, tau: np.ndarray,
    c: np.ndarray, ldc: int, work: np.ndarray, lwork: int, info: np.ndarray,
) -> Iterator[Need]:  # fmt: skip
    """C multiplied by the orthogonal matrix of k reflectors."""
    yield Need("a", m if side == "L" else n, k, lda, written=True)  # changed and restored
    yield Need("tau", k)
    yield Need("c", m, n, ldc, written=True)
    yield Need("work", max(1, lwork, n if side == "L" else m), written=True)
    yield Need("info", 1, written=True, integer=True)


def _potrf(uplo: str, n: int, a: np.ndarray, lda: int, info: np.ndarray) -> Iterator[Need]:
    """The Cholesky factor of a definite matrix, in one of its triangles."""
    yield Need("a", n, n, lda, written=True)
    yield Need("info", 1, written=True, integer=True)


def _potrs(
    uplo: str, n: int, nrhs: int, a: np.ndarray, lda: int, b: np.ndarray, ldb: int,
    info: np.ndarray,
) -> Iterator[Need]:  # fmt: skip
    """Division by a matrix whose Cholesky factor is known."""
    yield Need("a", n, n, lda)
    yield Need("b", n, nrhs, ldb, written=True)
    yield Need("info", 1, written=True, integer=True)


def _trtrs(
    uplo: str, trans: str, diag: str, n: int, nrhs: int, a: np.ndarray, lda: int, b: np.ndarray,
    ldb: int, info: np.ndarray,
) -> Iterator[Need]:  # fmt: skip
    """Division by a triangular matrix."""
    yield Need("a", n, n, lda)
    yield Need("b", n, nrhs, ldb, written=True)
    yield Need("info", 1, written=True, integer=True)


_NEEDS: dict[str, Callable[..., Iterator[Need]]] = {
    "gemm": _gemm,
    "ormqr": _ormqr,
    "potrf": _potrf,
    "potrs": _potrs,
    "stein": _stein,
    "sterf": _sterf,
    "syrk": _syrk,
    "sytrd": _sytrd,
    "trtrs": _trtrs,
}
_LETTERS = {np.dtype("float32"): "s", np.dtype("float64"): "d"}
_CHARACTERS = {
    "transa": "NTC",
    "transb": "NTC",
    "trans": "NTC",
    "uplo": "UL",
    "side": "LR",
    "diag": "NU",
}
