"""Systems of equations with covariances: Cholesky factors, and eigenvectors where there is none.

LAPACK is called without Python's lock, so that several layers, or folds, are solved side by side.
"""

import numpy as np
from jaxtyping import Float

from lowrank_jax.factorization.lapack import routine

Array = np.ndarray

TINY = np.finfo(np.float64).tiny
JITTER = 1e-10  # of the mean eigenvalue: rounding leaves covariances this far from definite
NOTHING = 1e-12  # of the largest eigenvalue: directions in which the data say nothing
FLOAT64 = np.dtype(np.float64)


def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """L, lower triangular, with L L^T a covariance; what rounding made indefinite is raised."""
    size = len(matrix)
    jitter = JITTER * np.trace(matrix) / size
    root = _symmetric_copy(matrix)
    root[np.diag_indices(size)] += jitter if jitter > 0 else 1.0
    if _factored(root):
        for column in range(1, size):  # a copy would be as large as the matrix
            root[:column, column] = 0
        return root
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    floor = max(JITTER * values[-1], TINY)
    return np.linalg.qr((vectors * np.sqrt(np.maximum(values, floor))).T)[1].T


def raised(matrix: Float[Array, "n n"], ridge: float) -> Float[Array, "n n"]:
    """A matrix with a multiple of the identity added."""
    found = matrix.copy()
    found[np.diag_indices(len(found))] += ridge
    return found


class Inverse:
    """Divides by a covariance."""

    def __init__(self, matrix: Float[Array, "n n"]) -> None:
        self.root = np.asfortranarray(cholesky(matrix))

    def __call__(self, right: Float[Array, "n m"]) -> Float[Array, "n m"]:
        return _divided(self.root, right)


def solve(normal: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Solves normal equations.

    A Cholesky factor solves them. Where the matrix is singular, or nearly so, its eigenvectors do,
    and directions in which the data say nothing get zero.
    """
    root = _symmetric_copy(normal)
    if _factored(root):
        pivots = np.diag(root)
        if pivots.min() ** 2 > NOTHING * pivots.max() ** 2:
            return _divided(root, right)
    return _solve_by_eigenvectors(normal, right)


def solve_triangular(root: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Divides by L^T, for a lower triangular L of Fortran's order."""
    root, found = np.asfortranarray(root), np.array(right, np.float64, order="F")
    (size, columns), info = found.shape, np.zeros(1, np.intc)
    given = ("L", "T", "N", size, columns, root, size, found, size, info)
    routine("trtrs", FLOAT64)(*given)
    return found


def _symmetric_copy(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """A copy in Fortran's order; a symmetric matrix is its own transpose, which costs less."""
    by_row = matrix.flags.c_contiguous
    return np.array(matrix.T if by_row else matrix, np.float64, order="F")


def _factored(matrix: Float[Array, "n n"]) -> bool:
    """Puts L into the lower triangle of a matrix; whether the matrix was definite."""
    size, info = len(matrix), np.zeros(1, np.intc)
    routine("potrf", FLOAT64)("L", size, matrix, max(size, 1), info)
    return not info[0]


def _divided(root: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Divides by L L^T; the upper triangle is not read."""
    found = np.array(right, np.float64, order="F")
    (size, columns), info = found.shape, np.zeros(1, np.intc)
    routine("potrs", FLOAT64)("L", size, columns, root, size, found, size, info)
    return found


def _solve_by_eigenvectors(
    normal: Float[Array, "n n"], right: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    values, vectors = np.linalg.eigh((normal + normal.T) / 2)
    keep = values > NOTHING * max(values[-1], TINY)
    return vectors[:, keep] @ ((vectors[:, keep].T @ right) / values[keep, None])
