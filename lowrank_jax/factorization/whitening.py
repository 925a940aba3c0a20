"""Data-aware factors: the smallest error of the outputs instead of the smallest error of the
kernel.

A kernel W (a, b, c, n) has taps a of the first and b of the second convolution. With C the
covariance of the patches it sees, (a, b, c) squared, and R their covariance with the wanted
outputs, factors V (a, c, K) and H (K, b, n) are to minimise tr(W~^T C W~) - 2 tr(R^T W~), W~[y, x]
= V[y] H[x]. If C is a Kronecker product of A (a, c) squared and B (b) squared, the optimum is the
truncated SVD of A^1/2 M (B^1/2 x I) with M the kernel's matrix; otherwise that is the start, and
least squares for H, then V, go on from there. NumPy in float64.
"""

import numpy as np

Array = np.ndarray
FLOOR = 1e-6  # of the largest eigenvalue: directions that the data hardly have are not amplified beyond this


def kronecker(covariance: Array) -> tuple[Array, Array]:
    """The mean covariance of the vertical strips and the correlation of the horizontal offsets.

    Args:
        covariance: (a, b, c, a, b, c).

    Returns:
        A, (a * c, a * c), and B, (b, b) of trace b, whose product stands in for the covariance.
    """
    a, b, c = covariance.shape[:3]
    strips = np.einsum("yxcYxC->ycYC", covariance).reshape(a * c, a * c) / b
    offsets = np.einsum("yxcyXc->xX", covariance)
    return strips, offsets * (b / max(np.trace(offsets), np.finfo(float).tiny))


def roots(matrix: Array) -> tuple[Array, Array]:
    """The symmetric square root of a covariance and its inverse, small eigenvalues raised to a
    floor."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    top = values[-1] if values[-1] > 0 else 1.0
    root = np.sqrt(np.maximum(values, FLOOR * top))
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def whitened(
    kernel: Array, covariance: Array | None, weights: Array | None = None
) -> tuple[Array, Array, Array]:
    """One SVD from which the factors of every rank are slices.

    Args:
        kernel: (a, b, c, n).
        covariance: (a, b, c, a, b, c); None for the plain SVD.
        weights: importance of each output channel, (n,); ones if None.

    Returns:
        Left (a * c, r), singular values (r,) and right (r, b * n): the kernel's matrix at rank K is
        left[:, :K] * values[:K] @ right[:K].
    """
    a, b, c, n = kernel.shape
    matrix = kernel.transpose(0, 2, 1, 3).reshape(a * c, b * n)
    columns = np.tile(
        np.ones(n) if weights is None else np.maximum(weights, FLOOR * weights.max()), b
    )
    if covariance is None:
        u, s, v = np.linalg.svd(matrix * columns, full_matrices=False)
        return u, s, v / columns
    strips, offsets = kronecker(covariance)
    (root_a, inverse_a), (root_b, inverse_b) = roots(strips), roots(offsets)
    u, s, v = np.linalg.svd(root_a @ _offsets(matrix, root_b, b) * columns, full_matrices=False)
    return inverse_a @ u, s, _offsets(v / columns, inverse_b, b)


def _offsets(matrix: Array, factor: Array, b: int) -> Array:
    """matrix @ (factor x I), for columns (b, n)."""
    return np.einsum("rxn,xX->rXn", matrix.reshape(len(matrix), b, -1), factor).reshape(
        matrix.shape
    )


def refit_second(first: Array, covariance: Array, cross: Array) -> Array:
    """The best horizontal factor for a vertical one: least squares against the whole covariance.

    Args:
        first: V (a, c, K).
        covariance: (a, b, c, a, b, c).
        cross: R (a, b, c, n).

    Returns:
        H (K, b, n).
    """
    b = covariance.shape[1]
    rank, n = first.shape[-1], cross.shape[-1]
    half = np.einsum("yck,yxcYXC->kxYXC", first, covariance, optimize=True)
    normal = np.einsum("kxYXC,YCl->kxlX", half, first, optimize=True)
    normal = normal.reshape(rank * b, rank * b)
    right = np.einsum("yck,yxcn->kxn", first, cross, optimize=True).reshape(rank * b, n)
    return solve(normal, right).reshape(rank, b, n)


def solve(normal: Array, right: Array) -> Array:
    """Solves normal equations; directions of tiny eigenvalues, in which the data say nothing, get
    zero."""
    values, vectors = np.linalg.eigh((normal + normal.T) / 2)
    keep = values > 1e-12 * max(values[-1], np.finfo(float).tiny)
    return vectors[:, keep] @ ((vectors[:, keep].T @ right) / values[keep, None])


def refit_first(
    first: Array, second: Array, covariance: Array, cross: Array, steps: int = 30
) -> Array:
    """The best vertical factor for a horizontal one, by conjugate gradients from the one given.

    Preconditioned by the Kronecker stand-in of the covariance, for which one step would be exact.
    """
    a, b, c = covariance.shape[:3]
    flat = covariance.reshape(a * b * c, a * b * c)

    def normal(v: Array) -> Array:
        dense = merged(v, second).reshape(a * b * c, -1)
        return np.einsum(
            "yxcn,kxn->yck", (flat @ dense).reshape(a, b, c, -1), second, optimize=True
        )

    strips, offsets = kronecker(covariance)
    inverse_a = roots(strips)[1]
    inverse_s = roots(np.einsum("kxn,xX,lXn->kl", second, offsets, second, optimize=True))[1]

    def precondition(r: Array) -> Array:
        return (inverse_a @ (inverse_a @ r.reshape(a * c, -1)) @ inverse_s @ inverse_s).reshape(
            r.shape
        )

    v = first
    r = np.einsum("yxcn,kxn->yck", cross, second, optimize=True) - normal(v)
    z = precondition(r)
    p, rz = z, float(np.sum(r * z))
    start = rz
    for _ in range(steps):
        if rz <= 1e-12 * start or rz <= 0:
            break
        q = normal(p)
        step = rz / float(np.sum(p * q))
        v, r = v + step * p, r - step * q
        z = precondition(r)
        p, rz = z + (float(np.sum(r * z)) / rz) * p, float(np.sum(r * z))
    return v


def fit(
    kernel: Array,
    covariance: Array,
    cross: Array,
    rank: int,
    weights: Array | None = None,
    sweeps: int = 1,
) -> tuple[Array, Array]:
    """The two factors of a rank for given moments.

    Args:
        kernel: (a, b, c, n) whose whitened SVD is the start; the least-squares optimum of full rank
            is best.
        covariance: (a, b, c, a, b, c).
        cross: (a, b, c, n); ``covariance @ kernel`` asks for the outputs of the kernel itself.
        rank: K.
        weights: as in `whitened`.
        sweeps: alternating refinements after the first refit of the horizontal factor.

    Returns:
        V (a, c, K) and H (K, b, n), balanced to equal norm; never worse, with weights, than the
        plain SVD's slices.
    """
    a, b, c, n = kernel.shape
    important = np.ones(n) if weights is None else weights

    def error(first: Array, second: Array) -> float:
        return output_error(merged(first, second) * important, covariance, cross * important)

    plain, values, right = whitened(kernel, None, weights)
    limit = error(
        (plain[:, :rank] * values[:rank]).reshape(a, c, -1), right[:rank].reshape(-1, b, n)
    )
    for left in (whitened(kernel, covariance, weights)[0], plain):
        factors = _refined(left[:, :rank].reshape(a, c, rank), covariance, cross, sweeps)
        if error(*factors) <= limit:
            break
    return balance(*factors)


def _refined(first: Array, covariance: Array, cross: Array, sweeps: int) -> tuple[Array, Array]:
    """Least squares for the second factor of a start, then for both in turn; each makes the error
    smaller."""
    first = orthonormal(first)
    second = refit_second(first, covariance, cross)
    for _ in range(sweeps):
        first = orthonormal(refit_first(first, second, covariance, cross))
        second = refit_second(first, covariance, cross)
    return first, second


def orthonormal(first: Array) -> Array:
    """A vertical factor (a, c, K) with the same span, whose K columns are orthonormal."""
    return np.linalg.qr(first.reshape(-1, first.shape[-1]))[0].reshape(first.shape)


def balance(first: Array, second: Array) -> tuple[Array, Array]:
    """The same product as U S^1/2 and S^1/2 Q^T of its SVD, so that fine-tuning starts balanced."""
    (a, c, rank), (_, b, n) = first.shape, second.shape
    q, upper = np.linalg.qr(first.reshape(a * c, rank))
    u, s, v = np.linalg.svd(upper @ second.reshape(rank, b * n), full_matrices=False)
    root = np.sqrt(s)
    left, right = (q @ u) * root, root[:, None] * v
    return left.reshape(a, c, rank), right.reshape(rank, b, n)


def merged(first: Array, second: Array) -> Array:
    """The kernel (a, b, c, n) of two factors."""
    return np.einsum("yck,kxn->yxcn", first, second, optimize=True)


def output_error(kernel: Array, covariance: Array, cross: Array) -> float:
    """tr(W^T C W) - 2 tr(R^T W): the mean squared error of the outputs, less what no kernel
    changes."""
    flat, wanted = kernel.reshape(-1, kernel.shape[-1]), cross.reshape(-1, cross.shape[-1])
    size = len(flat)
    return float(np.sum(flat * (covariance.reshape(size, size) @ flat)) - 2 * np.sum(wanted * flat))
