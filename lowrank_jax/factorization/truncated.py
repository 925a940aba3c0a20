"""The best factors of a rank of a matrix: the truncated singular value decomposition, by one of two
routes.

The reference is ``jnp.linalg.svd`` (on the host LAPACK's gesdd, which it calls on a CPU). The fast
route takes the K leading eigenvectors U of the smaller Gram matrix, G = M M^T or M^T M, and
projects: M is close to U (U^T M), with an error that no other basis of that size undercuts
(Eckart and Young, 1936), and at full rank exactly M. It needs no more than K eigenvectors of a
matrix of the smaller side.

Squaring loses digits: with the rounding unit u, what G says of the energy left out, T, is uncertain
by about K u s_1^2. So the fast route is taken only where that is under 1e-3 of T, and its result
only if U is orthonormal and the energy that it captures is that of the leading eigenvalues, which
are found independently of U, to 1e-5 of T. Otherwise the reference runs. What is lost is second
order in the uncertainty: the tests hold the Frobenius error to within 1e-5 of the optimum over
condition numbers from 1 to 1e6.
"""

from collections.abc import Callable

import numpy as np
import scipy.linalg

from lowrank_jax.factorization.differentiable import by_jax
from lowrank_jax.factorization.lapack import routine
from lowrank_jax.factorization.layout import Array

SMALL = 128  # smaller side up to which a full decomposition takes no longer
BLOCK = 64  # columns at a time, for which LAPACK's blocked routines get room
UNCERTAIN, MISSED = 1e-3, 1e-5  # of the energy left out

Pair = tuple[np.ndarray, np.ndarray]


def truncated(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Factors U_K S_K^1/2 and S_K^1/2 Q_K^T of a matrix, or of each of a stack.

    Args:
        matrix: array of shape (..., m, n), float32 or float64. A NumPy array is factored on the
            host by the faster route, a JAX array by ``jnp.linalg.svd``.
        rank: K, from 1 to min(m, n).

    Returns:
        Arrays of shapes (..., m, K) and (..., K, n), of the same kind and type.

    Example:
        >>> left, right = truncated(np.diag([3.0, 2.0, 1.0]), rank=2)
        >>> left.shape, right.shape, np.round(np.diag(left @ right)).tolist()
        ((3, 2), (2, 3), [3.0, 2.0, 0.0])
    """
    if not isinstance(matrix, np.ndarray):
        return by_jax(matrix, rank)
    *stack, m, n = matrix.shape
    pairs = [by_gram(one, rank) or by_svd(one, rank) for one in matrix.reshape(-1, m, n)]
    lefts, rights = (
        np.stack(parts) if len(parts) > 1 else parts[0] for parts in zip(*pairs, strict=True)
    )
    return lefts.reshape(*stack, m, rank), rights.reshape(*stack, rank, n)


def by_svd(matrix: np.ndarray, rank: int) -> Pair:
    """The factors of one matrix by its full decomposition."""
    u, s, qt = scipy.linalg.svd(matrix, full_matrices=False, check_finite=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * qt[:rank]


def by_gram(matrix: np.ndarray, rank: int) -> Pair | None:
    """The factors of one matrix by its smaller Gram matrix; None where this route is not faster or
    not accurate."""
    if matrix.shape[0] > matrix.shape[1]:
        found = by_gram(matrix.T, rank)
        return found and (found[1].T, found[0].T)
    if len(matrix) <= SMALL:
        return None
    (m, n), dtype = matrix.shape, matrix.dtype
    by_column = matrix.flags.f_contiguous  # whichever of the two LAPACK reads without a copy
    given = matrix if by_column else np.ascontiguousarray(matrix)
    read, step = ("N", m) if by_column else ("T", n)  # how, and the distance of its columns or rows
    values, vectors = _eigen(
        lambda gram: routine("syrk", dtype)("L", read, m, n, 1.0, given, step, 0.0, gram, m), given
    )
    left_out = float(values[:-rank].sum(dtype=np.float64))
    if not rank * np.finfo(dtype).eps / 2 * values[-1] <= UNCERTAIN * left_out:
        return None
    leading = vectors(rank)
    del vectors  # and the space of the Gram matrix with it
    columns, turned = np.empty((n, rank), dtype, "F"), "T" if by_column else "N"
    routine("gemm", dtype)(turned, "N", n, rank, m, 1.0, given, step, leading, m, 0.0, columns, n)
    projected = columns.T
    energies = np.einsum("kn,kn->k", projected, projected)
    missed = values[-rank:].sum(dtype=np.float64) - energies.sum(dtype=np.float64)
    if not _orthonormal(leading) or abs(missed) > MISSED * left_out or not energies.min() > 0:
        return None
    root = np.sqrt(np.sqrt(energies))
    leading *= root
    projected /= root[:, None]
    return leading, projected


def _eigen(
    write_gram: Callable[[np.ndarray], None], like: np.ndarray
) -> tuple[np.ndarray, Callable[[int], np.ndarray]]:
    """All eigenvalues of a symmetric matrix, ascending, and a function that gives so many of the
    leading eigenvectors.

    Reduction to tridiagonal form, all eigenvalues of that by a variant of QR, eigenvectors by
    inverse iteration, and back: LAPACK's sytrd, sterf, stein, ormqr. No driver of LAPACK combines
    these, and SciPy's take longer. What does not converge shows in the caller's checks.

    Args:
        write_gram: fills the lower triangle of an array of Fortran's order with the matrix.
        like: has as many rows as it, and its type.
    """
    size, dtype = len(like), like.dtype
    # One column more: sytrd's reflectors begin one row below the diagonal, ormqr's on it, so that
    # the same memory from a column earlier is what ormqr takes, its first reflector the identity.
    # Nothing is copied.
    space = np.zeros((size + 1) * size, dtype)
    shifted, gram = (
        space[start : start + size * size].reshape(size, size).T for start in (0, size)
    )
    write_gram(gram)
    diagonal, beside, scales, work = (
        np.zeros(length, dtype) for length in (size, size, size, BLOCK * size)
    )
    info = np.zeros(1, np.intc)
    routine("sytrd", dtype)(
        "L", size, gram, size, diagonal, beside, scales[1:], work, len(work), info
    )
    values, used = diagonal.copy(), beside.copy()
    routine("sterf", dtype)(size, values, used, info)

    def vectors(count: int) -> np.ndarray:
        found, failed = np.zeros((size, count), dtype, "F"), np.empty(count, np.intc)
        block, ends = np.ones(size, np.intc), np.full(size, size, np.intc)  # the whole is one block
        room = (np.empty(5 * size, dtype), np.empty(size, np.intc), failed, info)
        routine("stein", dtype)(
            size, diagonal, beside, count, values[-count:], block, ends, found, size, *room
        )
        work = np.empty(BLOCK * count, dtype)
        given = (shifted, size, scales, found, size, work, len(work), info)
        routine("ormqr", dtype)("L", "N", size, count, size, *given)
        return found

    return values, vectors


def _orthonormal(vectors: np.ndarray) -> bool:
    """Whether columns are orthonormal to rounding, by a random probe: its chance to miss a defect
    is negligible."""
    probe = np.asarray(np.random.default_rng(0).standard_normal(vectors.shape[1]), vectors.dtype)
    gap = np.einsum("mk,m->k", vectors, np.einsum("mk,k->m", vectors, probe)) - probe
    return bool(np.linalg.norm(gap) < 200 * np.finfo(vectors.dtype).eps * np.linalg.norm(probe))
