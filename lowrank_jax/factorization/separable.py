"""The decompositions of one kernel, each a small frozen config."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factorization.factors import FACTORS as FACTORS
from lowrank_jax.factorization.factors import as_kernel
from lowrank_jax.factorization.layout import (
    Array,
    from_matrix,
    from_pair,
    split_axes,
    to_matrix,
    to_pair,
)
from lowrank_jax.factorization.parallel import side_by_side
from lowrank_jax.factorization.placement import (
    dense_sharding,
    factor_sharding,
    gathered,
    place_of,
    placed,
    typed_sharding,
)
from lowrank_jax.factorization.ranks import check_rank
from lowrank_jax.factorization.ranks import max_rank as max_rank
from lowrank_jax.factorization.truncated import truncated


@dataclasses.dataclass(frozen=True)
class Separable:
    """A vertical (h x 1) and a horizontal (1 x w) kernel in place of an (h x w) one.

    The factors are the closed-form optimum of Tai et al., 2016 (arXiv 1511.06067): with the
    singular value decomposition M = U S Q^T of the kernel's matrix, V = U_K S_K^1/2 and H = S_K^1/2
    Q_K^T. No other pair of that rank has a smaller Frobenius error, which is the root of the sum of
    the squared singular values left out (Eckart and Young, 1936).

    In one dimension the vertical kernel has all the taps and the horizontal one is pointwise; in
    three the vertical one has the first axis and the horizontal one the other two.

    Attributes:
        rank: number K of channels between the two convolutions, per group.
        groups: ``feature_group_count`` of the dense convolution; a parameter tree does not tell it.
        axes: the kernel's layout, one letter an axis; I and O are the channels, the others are
            spatial.
        first: "vertical", or "horizontal" where the horizontal convolution is to come first.

    Example:
        >>> import jax
        >>> kernel = jax.random.normal(jax.random.key(0), (5, 5, 3, 192))
        >>> vertical, horizontal = Separable(rank=10).factor(kernel)
        >>> vertical.shape, horizontal.shape
        ((5, 1, 3, 10), (1, 5, 10, 192))
    """

    rank: int
    groups: int = 1
    axes: str = "HWIO"
    first: str = "vertical"

    def factor(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Factors a kernel, or each of a stack of kernels.

        Computed in float32, or float64 where the kernel is, and returned in the kernel's own type.
        Under a transformation by ``jnp.linalg.svd``; a kernel with values on one device by the
        faster of the routes of `truncated`, on the host. Gradients are those of the
        product of the factors, and finite for equal singular values.

        Args:
            kernel: floating-point array of shape (..., h, w, c, n), or as ``axes`` says, c being
                the input channels per group.

        Returns:
            The first kernel, (..., h, 1, c, groups * rank) if it is the vertical one, and the
            second, (..., 1, w, rank, n), both in the kernel's layout. Within each group both have
            the same norm.

        Raises:
            ValueError: the rank is not an int from 1 to `max_rank`, or the groups do not divide n.
        """
        return factor_all([self], [kernel])[0]

    def _factors(self, kernel: Array, wide: Any) -> tuple[Array, Array]:
        whole = gathered(kernel).astype(wide)
        matrix = to_matrix(to_pair(whole, self.axes, self.first), self.groups)
        pair = self.fold(*truncated(matrix, int(self.rank)), kernel.shape)
        places = self.shardings(typed_sharding(kernel), kernel.ndim)
        first, second = (
            placed(x.astype(kernel.dtype), y) for x, y in zip(pair, places, strict=True)
        )
        return first, second

    def shardings(self, sharding: Any, ndim: int) -> tuple[Any, Any]:
        """Those of both factors of a kernel with this one: the same along the axes they share."""
        one, two = (factor_sharding(sharding, ndim, self.axes, self.first, i) for i in (0, 1))
        return one, two

    def fold(self, left: Array, right: Array, shape: Sequence[int]) -> tuple[Array, Array]:
        """Turns the factors of the matrix of each group into the two kernels.

        Args:
            left: array of shape (..., groups, a * c, rank), a being the taps of the first
                convolution.
            right: array of shape (..., groups, rank, b * n / groups).
            shape: of the dense kernel.
        """
        sizes, (one, two) = self._sizes(shape), split_axes(self.axes, self.first)
        taps = [math.prod(sizes[letter] for letter in part) for part in (one, two)]
        first = from_matrix(left, (taps[0], 1, sizes["I"], self.groups * self.rank))
        second = from_matrix(right, (1, taps[1], self.rank, sizes["O"]))
        kernels = ((first, one), (second, two))
        return tuple(
            from_pair(x, self.axes, self.first, {a: sizes[a] for a in part}) for x, part in kernels
        )  # type: ignore[return-value]

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the two kernels in place of a kernel of this shape, which has no stack."""
        sizes, (one, two) = self._sizes(shape), split_axes(self.axes, self.first)
        first = {"I": sizes["I"], "O": self.groups * self.rank} | {
            letter: sizes[letter] for letter in one
        }
        second = {"I": self.rank, "O": sizes["O"]} | {letter: sizes[letter] for letter in two}
        return tuple(first.get(x, 1) for x in self.axes), tuple(second.get(x, 1) for x in self.axes)

    def check(self, shape: Sequence[int], where: str) -> int:
        """Returns the rank as an int, or raises ValueError that names where it was given."""
        channels = self._sizes(shape, where)["O"]
        if self.groups < 1 or channels % self.groups:
            raise ValueError(
                f"{where}: groups={self.groups} must be at least 1 and divide the {channels} "
                "outputs."
            )
        return check_rank(
            self.rank,
            max_rank(shape, self.groups, self.axes, self.first),
            where,
            shape,
            self.groups,
        )

    def parameters(self, shape: Sequence[int]) -> int:
        """Number of parameters of both factors of a kernel of this shape."""
        sizes, (one, two) = self._sizes(shape), split_axes(self.axes, self.first)
        first = math.prod(sizes[letter] for letter in one) * sizes["I"] * self.groups
        return self.rank * (first + math.prod(sizes[letter] for letter in two) * sizes["O"])

    def _sizes(self, shape: Sequence[int], where: str = "Separable") -> dict[str, int]:
        split_axes(self.axes, self.first)  # refuses a layout that names no axes
        if len(shape) < len(self.axes):
            raise ValueError(
                f"{where}: a kernel of shape {tuple(shape)} has fewer axes than "
                f"axes={self.axes!r}; give the layout of its own axes."
            )
        return dict(zip(self.axes, shape[len(shape) - len(self.axes) :], strict=True))


def factor_all(
    schemes: Sequence[Separable], kernels: Sequence[jax.Array]
) -> list[tuple[jax.Array, jax.Array]]:
    """Factors of many kernels, each as `Separable.factor` gives them; those with values are done
    side by side."""
    # A float64 array of NumPy takes the widest type that is enabled.
    kernels = [jnp.asarray(as_kernel(kernel, "Separable")) for kernel in kernels]
    places, jobs = list(map(place_of, kernels)), []
    for scheme, kernel, where in zip(schemes, kernels, places, strict=True):
        scheme.check(kernel.shape, "Separable")
        given: Any = np.asarray(kernel) if where else kernel
        jobs.append(
            functools.partial(scheme._factors, given, jnp.promote_types(kernel.dtype, jnp.float32))
        )

    def place(index: int, pair: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        if (where := places[index]) is None:
            return pair
        scheme, ndim = schemes[index], kernels[index].ndim
        return jax.device_put(pair, scheme.shardings(where, ndim))

    cores = None if all(places) else 1  # what JAX traces belongs to this thread
    return side_by_side(jobs, [kernel.size for kernel in kernels], place, cores)


def merge(first: jax.Array, second: jax.Array, axes: str = "HWIO") -> jax.Array:
    """Multiplies two factors back into one dense kernel.

    Args:
        first, second: kernels as `Separable.factor` returns them, (..., h, 1, c, groups * rank) and
            (..., 1, w, rank, n) or in the layout given.
        axes: their layout.

    Returns:
        The kernel of shape (..., h, w, c, n) that the two convolutions together apply.

    Example:
        >>> import jax.numpy as jnp
        >>> merge(jnp.ones((5, 1, 3, 10)), jnp.ones((1, 5, 10, 192))).shape
        (5, 5, 3, 192)
    """
    channels = [axes.index(letter) - len(axes) for letter in "IO"]
    dtype = jnp.result_type(first, second)
    wide = jnp.promote_types(dtype, jnp.float32)
    pair = (gathered(x).astype(wide) for x in (first, second))
    left, right = (jnp.moveaxis(x, channels, (-2, -1)) for x in pair)
    rank = right.shape[-2]
    left = left.reshape(*left.shape[:-1], -1, rank)  # (..., c, g, K)
    right = right.reshape(*right.shape[:-1], left.shape[-2], -1)  # (..., K, g, n/g)
    # A spatial axis has size 1 in one of the factors, so that broadcasting spreads the taps of the
    # other.
    product = jnp.einsum("...cgk,...kgn->...cgn", left, right, precision=jax.lax.Precision.HIGHEST)
    dense = product.reshape(*product.shape[:-2], -1)
    kernel = jnp.moveaxis(dense, (-2, -1), channels).astype(dtype)
    return placed(kernel, dense_sharding((first, second), axes))


def spectrum(
    kernel: jax.Array, groups: int = 1, axes: str = "HWIO", first: str = "vertical"
) -> jax.Array:
    """Singular values of the matrix of each group of a kernel, largest first.

    Args:
        kernel: floating-point array of shape (..., h, w, c, n), c being the input channels per
            group.
        groups: number of feature groups.
        axes, first: as in `Separable`.

    Returns:
        Array of shape (..., groups, max_rank), float32 or float64. `Separable` at rank K leaves out
        those from index K on, and its Frobenius error is the root of the sum of their squares.

    Example:
        >>> import jax.numpy as jnp
        >>> [round(value) for value in spectrum(jnp.ones((3, 3, 2, 2)))[0].tolist()]
        [6, 0, 0, 0, 0, 0]
    """
    kernel = as_kernel(kernel, "spectrum")
    wide = gathered(kernel).astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return jnp.linalg.svd(to_matrix(to_pair(wide, axes, first), groups), compute_uv=False)
