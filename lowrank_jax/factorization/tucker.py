"""The scheme of Tucker: a pointwise, a spatial and a pointwise convolution in place of one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factorization.channel import Channel
from lowrank_jax.factorization.layout import Array
from lowrank_jax.factorization.merging import merge
from lowrank_jax.factorization.truncated import truncated

SWEEPS = 1  # of the alternation beyond the first; more change the error by under a thousandth


@dataclasses.dataclass(frozen=True)
class Tucker(Channel):
    """A (1 x 1) kernel to K1 channels, an (h x w) one to K2, and a (1 x 1) one from there.

    That is `Channel` with the pointwise convolution first, whose second factor is decomposed by
    `Channel` again, the spatial convolution first. Both channel axes of a kernel are reduced, as in
    Kim et al., 2016 (arXiv 1511.06530). The subspaces come from truncated singular value
    decompositions that alternate, beginning with the outputs (HOSVD, then HOOI; De Lathauwer et
    al., 2000). No step raises the Frobenius error. The squared error is at most the sum of the
    squared singular values that the two `Channel` schemes of these ranks leave out, and at least
    the larger part.

    Attributes:
        rank: number K1 of channels between the first two convolutions, per group.
        groups: ``feature_group_count`` of the dense convolution.
        axes: the kernel's layout, one letter an axis; I and O are the channels, the others are
            spatial.
        inner: number K2 of channels between the last two convolutions, per group.

    Example:
        >>> import jax
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 64, 128))
        >>> [factor.shape for factor in Tucker(rank=20, inner=40).factor(kernel)]
        [(1, 1, 64, 20), (3, 3, 20, 40), (1, 1, 40, 128)]
    """

    first: str = dataclasses.field(default="pointwise", init=False)
    inner: int = dataclasses.field(kw_only=True)

    @property
    def name(self) -> str:
        return "tucker"

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.rank, self.inner

    @property
    def outer(self) -> Channel:
        """The first convolution, and the product of the other two."""
        return Channel(self.rank, self.groups, self.axes, "pointwise")

    @property
    def core(self) -> Channel:
        """The scheme of the second factor of `outer`: the last two convolutions."""
        return Channel(self.inner, self.groups, self.axes, "spatial")

    def truncated(self, matrix: Array, taps: int) -> tuple[Array, Array]:
        """The factors of `outer`, the second of which has rank K2 across the outputs.

        Args:
            matrix: array of shape (..., c, taps * n), a row for each input.
            taps: number of the kernel's taps.
        """
        with jax.default_matmul_precision("highest"):
            return self._alternated(matrix, taps)

    def _alternated(self, matrix: Array, taps: int) -> tuple[Array, Array]:
        *stack, inputs, columns = matrix.shape
        tensor = matrix.reshape(*stack, inputs * taps, columns // taps)
        outputs = _span(truncated(tensor, self.inner)[1].mT)  # HOSVD, (..., n, K2)
        for _ in range(1 + SWEEPS):
            within = (tensor @ outputs).reshape(*stack, inputs, -1)
            left = _span(truncated(within, self.rank)[0])  # (..., c, K1)
            core = (left.mT @ matrix).reshape(*stack, self.rank * taps, -1)
            outputs = _span(truncated(core, self.inner)[1].mT)
        second = (core @ outputs @ outputs.mT).reshape(*stack, self.rank, columns)
        right_left, right = truncated(second, self.rank)
        return left @ right_left, right

    def parted(self, pair: tuple[Array, Array]) -> tuple[Array, ...]:
        wide = jnp.promote_types(pair[1].dtype, jnp.float32)
        core: tuple[Any, ...] = self.core.factors(pair[1], wide)
        return pair[0], *core

    def joined(self, factors: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, core, last = factors
        return first, merge(core, last, self.axes)

    def node(self, factors: Sequence[Any]) -> dict[str, Any]:
        first, *others = factors
        one, two = super().node((first, first))
        return {one: first, two: self.core.node(others)}

    def shardings(self, sharding: Any, ndim: int) -> tuple[Any, ...]:
        first, second = super().shardings(sharding, ndim)
        return first, *self.core.shardings(second, ndim)

    def taps(self) -> tuple[str, ...]:
        first, _ = super().taps()
        return first, *self.core.taps()

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        first, second = super().shapes(shape)
        return first, *self.core.shapes(second)

    def checked(self, shape: Sequence[int], where: str) -> Self:
        """The scheme with its ranks as ints, or a ValueError that names where they were given."""
        own = super().checked(shape, where)
        core = own.core.checked(own.outer.shapes(shape)[1], f"{where}, inner")
        spatial = math.prod(own._sizes(shape)[letter] for letter in own.core.taps()[0])
        if own.rank > spatial * core.rank:
            raise ValueError(
                f"{where}: rank {own.rank} is not allowed beside inner={core.rank}; give an int "
                f"from 1 to {spatial * core.rank}, the {spatial} taps times inner."
            )
        return dataclasses.replace(own, inner=core.rank)


def _span(columns: Array) -> Array:
    """An orthonormal basis of the space of some columns (..., m, K)."""
    library = np if isinstance(columns, np.ndarray) else jnp
    return library.linalg.qr(columns)[0]
