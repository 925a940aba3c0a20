"""Factors with the least error of the outputs, for given moments of the patches.

A kernel W (b, r, n) has b taps of the second convolution; its r rows are the taps of the first one
times the channels. With C (b * r, b * r) the covariance of the patches that it sees, and R (b * r,
n) their covariance with the wanted outputs, factors V (r, K) and H (b, K, n) are to minimise
tr(W~^T C W~) - 2 tr(R^T W~) with W~[x] = V H[x]. If C is a Kronecker product of B (b, b) and A (r,
r), the optimum is the truncated SVD of the kernel's matrix times roots of A and B. Otherwise that
is the start, and least squares for H, then V, then H go on from there. Where H is to have a rank
itself, a reduced-rank regression takes the place of its least squares. NumPy in float64.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from lowrank_jax.factorization.parallel import available_cores, together
from lowrank_jax.factorization.solving import (
    TINY,
    Inverse,
    cholesky,
    raised,
    solve,
    solve_triangular,
)
from lowrank_jax.factorization.truncated import truncated

Array = np.ndarray
Pair = tuple[Float[Array, "r K"], Float[Array, "b K n"]]

STEPS, CLOSE = 30, 1e-3  # of conjugate gradients: at most so many, to so small a residual


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """What factors are fitted to.

    Attributes:
        covariance: C, of the patches.
        cross: R, of the patches with the wanted outputs; ``C @ W`` asks for the outputs of a kernel
            W.
        variance: of the wanted outputs; it counts in the error alone.
        taps: b, of the second convolution.
    """

    covariance: Float[Array, "p p"]
    cross: Float[Array, "p n"]
    variance: Float[Array, "n"]
    taps: int

    @property
    def blocks(self) -> Float[Array, "b r b r"]:
        """The covariance between the rows of every two taps."""
        rows = len(self.covariance) // self.taps
        return self.covariance.reshape(self.taps, rows, self.taps, rows)

    @property
    def wanted(self) -> Float[Array, "b r n"]:
        """The covariance with the wanted outputs of every tap."""
        return self.cross.reshape(self.taps, -1, self.cross.shape[-1])

    def ridged(self, kernel: Float[Array, "b r n"], ridge: float) -> "Target":
        """The target with a ridge: a multiple of the identity, which pulls to a given kernel."""
        covariance = raised(self.covariance, ridge)
        cross = self.cross + ridge * kernel.reshape(self.cross.shape)
        return dataclasses.replace(self, covariance=covariance, cross=cross)

    def reduced(self, first: Float[Array, "r K"]) -> "Target":
        """What the second factor is fitted to: outputs of the first one are its patches."""
        taps, (rows, rank) = self.taps, first.shape
        parts = np.array_split(self.covariance.reshape(-1, rows), available_cores())
        half = _rows_of(lambda part: part @ first, parts)
        covariance = first.T @ half.reshape(taps, rows, taps * rank)
        cross = first.T @ self.wanted
        return dataclasses.replace(
            self,
            covariance=covariance.reshape(taps * rank, taps * rank),
            cross=cross.reshape(taps * rank, -1),
        )

    def error(self, kernel: Float[Array, "b r n"]) -> Float[Array, "n"]:
        """Mean squared error of each output of a kernel."""
        flat = kernel.reshape(self.cross.shape)
        return self.variance + np.sum(flat * (self.covariance @ flat - 2 * self.cross), axis=0)


def fit(
    kernel: Float[Array, "b r n"],
    target: Target,
    ranks: Sequence[int],
    sweeps: int = 1,
) -> Pair:
    """Factors of a rank that give the wanted outputs best.

    Args:
        kernel: its whitened SVD is the start. The best choice is the kernel of full rank that gives
            the wanted outputs best.
        target: what is fitted to, with a definite covariance.
        ranks: K, and the rank of the second factor's matrix where that is to have one.
        sweeps: alternating refinements, after the first of the second factor. With one tap of the
            second factor the start is the optimum, and there are none.

    Returns:
        V, of orthonormal columns, and H.
    """
    metric = kronecker(target.blocks)
    first = whitened_left(kernel, *metric, ranks[0])
    return alternated(first, target, metric, ranks, sweeps if target.taps > 1 else 0)


def alternated(
    first: Float[Array, "r K"],
    target: Target,
    metric: tuple[Float[Array, "r r"], Float[Array, "b b"]],
    ranks: Sequence[int],
    sweeps: int,
    steps: int = STEPS,
) -> Pair:
    """Factors that go on from a first one: the best second one, then sweeps of both in turn.

    Args:
        first: where they start.
        metric: `kronecker` of the target.
        target, ranks, sweeps: as in `fit`.
        steps: of conjugate gradients for the first factor, at most.
    """
    second = best_second(target.reduced(first), ranks[1:])
    for _ in range(sweeps):
        first = _orthonormal(refit_first(first, second, target, *metric, steps))
        second = best_second(target.reduced(first), ranks[1:])
    return first, second


def _rows_of(job: Callable[[Array], Array], parts: Sequence[Array]) -> Array:
    """The rows that a job gives for each of some parts, which run at once."""
    return np.concatenate(together([functools.partial(job, part) for part in parts]))


def best_second(target: Target, ranks: Sequence[int]) -> Float[Array, "b r n"]:
    """The second factor that gives the wanted outputs best.

    Args:
        target: of the second factor.
        ranks: empty, or of the matrix with a row for each tap and channel: its two factors are a
            reduced-rank regression (Izenman, 1975), which one truncated SVD solves.
    """
    whole = least_squares(target)
    if not ranks:
        return whole
    flat = dataclasses.replace(target, taps=1)
    pair = fit(whole.reshape(1, *target.cross.shape), flat, ranks)
    return merged(*pair).reshape(whole.shape)


def least_squares(target: Target) -> Float[Array, "b r n"]:
    """The kernel that gives the wanted outputs best."""
    return solve(target.covariance, target.cross).reshape(target.wanted.shape)


def kronecker(
    blocks: Float[Array, "b r b r"], ridge: float = 0.0
) -> tuple[Float[Array, "r r"], Float[Array, "b b"]]:
    """Two covariances whose Kronecker product stands in for that of the patches.

    Args:
        blocks: the covariance of the patches.
        ridge: is added to the diagonal of the covariance first.

    Returns:
        A, the mean covariance of the strips that the first convolution sees, and B, the correlation
        of the taps of the second, with a trace of b.
    """
    taps = len(blocks)
    strips = functools.reduce(np.add, (blocks[x, :, x] for x in range(taps))) / taps
    return ridged(strips, np.einsum("xrXr->xX", blocks), ridge)


def ridged(
    strips: Float[Array, "r r"], offsets: Float[Array, "b b"], ridge: float
) -> tuple[Float[Array, "r r"], Float[Array, "b b"]]:
    """A and B of `kronecker`, from the sums over the taps and over the rows of the patches."""
    taps, rows = len(offsets), len(strips)
    strips, offsets = raised(strips, ridge), raised(offsets, ridge * rows)
    trace = np.trace(offsets)
    if trace <= TINY:  # inputs that do not vary; what is left of them is rounding
        return strips, np.eye(taps)
    return strips, offsets * (taps / trace)


def whitened(
    kernel: Float[Array, "b r n"], strips: Float[Array, "r r"], offsets: Float[Array, "b b"]
) -> tuple[Float[Array, "r bn"], Float[Array, "r r"]]:
    """The matrix whose truncated SVD is the optimum for a Kronecker covariance.

    Returns:
        L^T M (L_B x I), and L, with L L^T = A and L_B L_B^T = B.
    """
    root, across = cholesky(strips), cholesky(offsets)
    turned = np.tensordot(across, root.T @ kernel, axes=(0, 0))
    return matrix_of(turned), root


def whitened_left(
    kernel: Float[Array, "b r n"],
    strips: Float[Array, "r r"],
    offsets: Float[Array, "b b"],
    rank: int,
) -> Float[Array, "r K"]:
    """The first factor that is best for a Kronecker covariance, its columns orthonormal."""
    matrix, root = whitened(kernel, strips, offsets)
    left = truncated(matrix, rank)[0]
    return _orthonormal(solve_triangular(root, left))


def matrix_of(kernel: Float[Array, "b r n"]) -> Float[Array, "r bn"]:
    """The kernel's matrix: a row for each of the r rows, a column for each tap and output."""
    return kernel.transpose(1, 0, 2).reshape(kernel.shape[1], -1)


def refit_first(
    first: Float[Array, "r K"],
    second: Float[Array, "b K n"],
    target: Target,
    strips: Float[Array, "r r"],
    offsets: Float[Array, "b b"],
    steps: int = STEPS,
) -> Float[Array, "r K"]:
    """The best first factor for a second one, by conjugate gradients from the one given.

    The gradients are preconditioned by the Kronecker stand-in of the covariance, for which one step
    would be exact.
    """
    (taps, rank, _), rows = second.shape, len(first)
    flat = second.reshape(taps * rank, -1)
    products = (flat @ flat.T).reshape(taps, rank, taps * rank)  # of the second factor's rows
    strip_rows = target.covariance.reshape(taps, rows, -1)
    parts = np.array_split(strip_rows, available_cores(), axis=1)
    mixed = np.einsum("xkXl,xX->kl", products.reshape(taps, rank, taps, rank), offsets)
    inverse_a, inverse_s = Inverse(strips), Inverse(mixed)

    def normal(v: Array) -> Array:
        spread = (v @ products).reshape(taps * rows, taps, rank)

        return _rows_of(lambda part: sum(part[x] @ spread[:, x] for x in range(taps)), parts)

    def precondition(residual: Array) -> Array:
        return inverse_s(inverse_a(residual).T).T

    right = np.einsum("xrn,xkn->rk", target.wanted, second, optimize=True)
    return _conjugate_gradients(normal, precondition, right, first, steps)


def _conjugate_gradients(normal, precondition, right: Array, v: Array, steps: int) -> Array:
    """Goes from v towards the solution of normal(v) = right."""
    residual = right - normal(v)
    z = precondition(residual)
    direction, slope = z, float(np.sum(residual * z))
    limit = CLOSE**2 * slope
    for _ in range(steps):
        image = normal(direction)
        curvature = float(np.sum(direction * image))
        if slope <= limit or curvature <= 0:
            break
        v = v + (slope / curvature) * direction
        residual = residual - (slope / curvature) * image
        z = precondition(residual)
        before, slope = slope, float(np.sum(residual * z))
        direction = z + (slope / before) * direction
    return v


def balance(first: Float[Array, "r K"], second: Float[Array, "b K n"]) -> Pair:
    """The same product as U S^1/2 and S^1/2 Q^T of its SVD, so that fine-tuning starts balanced."""
    taps, rank, width = second.shape
    q, upper = np.linalg.qr(first)
    u, s, v = np.linalg.svd(upper @ matrix_of(second), full_matrices=False)
    root = np.sqrt(s)
    right = (root[:, None] * v).reshape(rank, taps, width)
    return (q @ u) * root, right.transpose(1, 0, 2)


def merged(first: Float[Array, "r K"], second: Float[Array, "b K n"]) -> Float[Array, "b r n"]:
    """The kernel of two factors."""
    return first @ second


def _orthonormal(first: Float[Array, "r K"]) -> Float[Array, "r K"]:
    """A first factor of the same span with orthonormal columns."""
    return np.linalg.qr(first)[0]
