"""The decompositions of one kernel, each a small frozen config."""

import dataclasses
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lowrank_jax.matricize import from_matrix, to_matrix


def max_rank(shape: Sequence[int], groups: int = 1) -> int:
    """The largest useful rank of a kernel: that at which the factors reproduce it.

    Args:
        shape: kernel shape (..., h, w, c, n), with c input channels per group.
        groups: number of feature groups.

    Returns:
        min(h * c, w * n / groups), the smaller side of the matrix of one group.

    Example:
        >>> max_rank((5, 5, 96, 192))
        480
    """
    h, w, c, n = shape[-4:]
    return int(min(h * c, w * (n // groups)))


def check_rank(rank: object, shape: Sequence[int], groups: int, where: str) -> int:
    """Returns the rank as an int, or raises an error that names where it was given."""
    limit = max_rank(shape, groups)
    try:
        value = 0 if isinstance(rank, bool) else operator.index(rank)  # type: ignore[arg-type]
    except TypeError:
        value = 0
    if not 1 <= value <= limit:
        raise ValueError(
            f"{where}: rank {rank!r} is not allowed; give an int from 1 to {limit}, which is "
            f"min(h * in, w * out) of one of the {groups} group(s) of the kernel {tuple(shape)}."
        )
    return value


@dataclasses.dataclass(frozen=True)
class Separable:
    """A vertical (h x 1) and a horizontal (1 x w) kernel in place of an (h x w) one.

    The factors are the closed-form optimum of Tai et al., 2016 (arXiv 1511.06067): with the singular value
    decomposition M = U S Q^T of the kernel's matrix, V = U_K S_K^1/2 and H = S_K^1/2 Q_K^T. No other pair
    of that rank has a smaller Frobenius error, which is the root of the sum of the squared singular values
    left out (Eckart and Young, 1936).

    Attributes:
        rank: number K of channels between the two convolutions, per group.
        groups: ``feature_group_count`` of the dense convolution; a parameter tree does not tell it.

    Example:
        >>> import jax
        >>> kernel = jax.random.normal(jax.random.key(0), (5, 5, 3, 192))
        >>> vertical, horizontal = Separable(rank=10).factor(kernel)
        >>> vertical.shape, horizontal.shape
        ((5, 1, 3, 10), (1, 5, 10, 192))
    """

    rank: int
    groups: int = 1

    def factor(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Factors a kernel, or each of a stack of kernels.

        Computed in float32, or float64 where the kernel is, and returned in the kernel's own type. Gradients
        pass through ``jnp.linalg.svd`` and so need the singular values to differ from each other.

        Args:
            kernel: floating-point array of shape (..., h, w, c, n), c being the input channels per group.

        Returns:
            The vertical kernel (..., h, 1, c, groups * rank) and the horizontal kernel
            (..., 1, w, rank, n). Within each group both have the same Frobenius norm.

        Raises:
            ValueError: the rank is not an int from 1 to `max_rank`, or the groups do not divide n.
        """
        kernel = jnp.asarray(kernel)  # a float64 NumPy kernel takes the widest type that is enabled
        h, w, c, n = kernel.shape[-4:]
        if self.groups < 1 or n % self.groups:
            raise ValueError(f"groups={self.groups} must be at least 1 and divide the {n} output channels.")
        rank = check_rank(self.rank, kernel.shape, self.groups, "Separable")
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        u, s, qt = jnp.linalg.svd(to_matrix(wide, self.groups), full_matrices=False)
        root = jnp.sqrt(s[..., :rank])
        vertical = from_matrix(u[..., :rank] * root[..., None, :], (h, 1, c, self.groups * rank))
        horizontal = from_matrix(root[..., :, None] * qt[..., :rank, :], (1, w, rank, n))
        return vertical.astype(kernel.dtype), horizontal.astype(kernel.dtype)

    @staticmethod
    def merge(vertical: jax.Array, horizontal: jax.Array) -> jax.Array:
        """Multiplies the factors back into one dense kernel.

        Args:
            vertical: array of shape (..., h, 1, c, groups * rank).
            horizontal: array of shape (..., 1, w, rank, n).

        Returns:
            The kernel of shape (..., h, w, c, n) that the two convolutions together apply.
        """
        h, _, c, channels = vertical.shape[-4:]
        _, w, rank, n = horizontal.shape[-4:]
        dtype = jnp.result_type(vertical, horizontal)
        wide = jnp.promote_types(dtype, jnp.float32)
        left, right = (to_matrix(x.astype(wide), channels // rank) for x in (vertical, horizontal))
        product = jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
        return from_matrix(product, (h, w, c, n)).astype(dtype)


def spectrum(kernel: jax.Array, groups: int = 1) -> jax.Array:
    """Singular values of the matrix of each group of a kernel, largest first.

    Args:
        kernel: floating-point array of shape (..., h, w, c, n), c being the input channels per group.
        groups: number of feature groups.

    Returns:
        Array of shape (..., groups, max_rank), float32 or float64. `Separable` at rank K leaves out those from
        index K on, and its Frobenius error is the root of the sum of their squares.

    Example:
        >>> import jax.numpy as jnp
        >>> [round(value) for value in spectrum(jnp.ones((3, 3, 2, 2)))[0].tolist()]
        [6, 0, 0, 0, 0, 0]
    """
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.linalg.svd(to_matrix(wide, groups), compute_uv=False)
