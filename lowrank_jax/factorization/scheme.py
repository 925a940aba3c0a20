"""A decomposition of one kernel into two factors, as a small frozen config: the base of all."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.factorization.axes import own_letters, split_axes
from lowrank_jax.factorization.factors import as_kernel, factor_keys, wide
from lowrank_jax.factorization.forms import FORMS, SCHEMES, Form, check_form
from lowrank_jax.factorization.layout import Array, from_matrix, from_pair, to_matrix, to_pair
from lowrank_jax.factorization.parallel import side_by_side
from lowrank_jax.factorization.placement import (
    factor_sharding,
    gathered,
    place_of,
    placed,
    typed_sharding,
)
from lowrank_jax.factorization.ranks import check_groups, check_rank, checked_sizes, max_rank
from lowrank_jax.factorization.truncated import truncated


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Two factors in place of a kernel, by the truncated SVD of one of its matrices.

    The rows of the matrix are the axes of the first factor, the columns those of the second. A
    subclass names its forms, each of which divides the axes in one way. Everything else follows:
    costs, plans, fits and the two operations that run.

    Attributes:
        rank: number K of channels between the two factors, per group.
        groups: into how many groups the outputs are divided, each with factors of its own.
        axes: the kernel's layout, one letter an axis; I and O are the channels, the others spatial.
        first: name of the form.
    """

    rank: int
    groups: int = 1
    axes: str = "HWIO"
    first: str = ""

    def __init_subclass__(cls, forms: Mapping[str, Form] | None = None, **kwargs: Any) -> None:
        """Makes the forms known under their names.

        Raises:
            ValueError: another scheme has such a name, or trees would not know the keys again.
        """
        forms = forms or {}
        super().__init_subclass__(**kwargs)
        for name, form in forms.items():
            check_form(name, form, cls.__qualname__)
        FORMS.update(forms)
        SCHEMES.update(dict.fromkeys(forms, cls))

    @property
    def name(self) -> str:
        """The name of the form, as plans show it."""
        return self.first

    @property
    def ranks(self) -> tuple[int, ...]:
        """Numbers of channels between one factor and the next."""
        return (self.rank,)

    @property
    def outer(self) -> "Scheme":
        """The scheme of the two factors alone, where one of them stands decomposed itself."""
        return self

    def factor(self, kernel: jax.Array) -> tuple[jax.Array, ...]:
        """Factors a kernel, or each of a stack of kernels.

        Computed in float32, or float64 where the kernel is, and returned in the kernel's own type.
        Under a transformation ``jnp.linalg.svd`` computes the factors. For a kernel with values on
        one device the faster route of `truncated` computes them on the host. Gradients are right
        for functions of the product of the factors, and finite for equal singular values. No other
        factors of that rank have a smaller Frobenius error, which is the root of the sum of the
        squared singular values left out (Eckart and Young, 1936).

        Args:
            kernel: floating-point array whose last axes are those that ``axes`` names.

        Returns:
            The factors in the kernel's layout, as `shapes` says. Within each group the two have the
            same norm.

        Raises:
            ValueError: the rank is not an int from 1 to `max_rank`, or the groups do not divide the
                outputs.
        """
        return factor_all([self], [kernel])[0]

    def factors(self, kernel: Array, wide: Any) -> tuple[Array, ...]:
        """What `factor` gives of a checked kernel, computed in a wide type."""
        spread = to_pair(gathered(kernel).astype(wide), *self._form)
        pair = self.truncated(to_matrix(spread, self.groups), spread.shape[-3])
        arrays = self.parted(self.fold(*pair, kernel.shape))
        places = self.shardings(typed_sharding(kernel), kernel.ndim)
        return tuple(placed(x.astype(kernel.dtype), y) for x, y in zip(arrays, places, strict=True))

    def truncated(self, matrix: Array, taps: int) -> tuple[Array, Array]:
        """The factors (..., m, K) and (..., K, n) of matrices, whose columns begin with the taps.

        Args:
            matrix: array of shape (..., m, n).
            taps: of the second factor.
        """
        return truncated(matrix, int(self.rank))

    def parted(self, pair: tuple[Array, Array]) -> tuple[Array, ...]:
        """All factors, made of the two factors of `outer`."""
        return pair

    def joined(self, factors: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The two factors of `outer`, made of all factors; the inverse of `parted`."""
        first, second = factors
        return first, second

    def node(self, factors: Sequence[Any]) -> dict[str, Any]:
        """What stands in a tree for the kernel with these factors."""
        return dict(zip(factor_keys(self.first, self.axes, factors[0].ndim), factors, strict=True))

    def shardings(self, sharding: Any, ndim: int) -> tuple[Any, ...]:
        """The factors' shardings: the kernel's, along the axes that a factor shares."""
        return tuple(factor_sharding(sharding, ndim, *self._form, i) for i in (0, 1))

    def fold(self, left: Array, right: Array, shape: Sequence[int]) -> tuple[Array, Array]:
        """Turns the factors of the matrix of each group into the two kernels.

        Args:
            left: array of shape (..., groups, a * c, rank), a being the taps of the first
                convolution.
            right: array of shape (..., groups, rank, b * n / groups).
            shape: of the dense kernel.
        """
        sizes = self._sizes(shape)
        a, b, c, n = to_pair(np.empty(tuple(sizes.values())), *self._form).shape
        first = from_matrix(left, (a, 1, c, self.groups * self.rank))
        second = from_matrix(right, (1, b, self.rank, n))
        return self.placed(first, 0, sizes), self.placed(second, 1, sizes)

    @property
    def _form(self) -> tuple[str, str]:
        return self.axes, self.first

    def placed(self, factor: Array, index: int, sizes: Mapping[str, int]) -> Array:
        """A factor (..., taps of the first, taps of the second, in, out) in the kernel's layout.

        Args:
            factor: either factor.
            index: its number.
            sizes: of the kernel, by letter.
        """
        own = {letter: sizes[letter] for letter in own_letters(*self._form, index)}
        return from_pair(factor, *self._form, own)

    def taps(self) -> tuple[str, ...]:
        """The spatial axes of each factor."""
        return split_axes(*self._form)

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Shapes of the factors in place of a kernel of this shape, which has no stack."""
        sizes = self._sizes(shape)
        one, two = ({x: sizes[x] for x in own_letters(*self._form, i)} for i in (0, 1))
        first, second = one | {"O": self.groups * self.rank}, two | {"I": self.rank}
        return tuple(first.get(x, 1) for x in self.axes), tuple(second.get(x, 1) for x in self.axes)

    def checked(self, shape: Sequence[int], where: str) -> Self:
        """The scheme with its rank as an int, or a ValueError that names where it was given."""
        sizes = self._sizes(shape, where)
        check_groups(self.groups, sizes, self.axes, where)
        limit = max_rank(shape, self.groups, *self._form)
        rank = check_rank(self.rank, limit, where, shape, self.groups)
        return dataclasses.replace(self, rank=rank)

    def parameters(self, shape: Sequence[int]) -> int:
        """Number of parameters of all factors of a kernel of this shape."""
        return sum(map(math.prod, self.shapes(shape)))

    def _sizes(self, shape: Sequence[int], where: str = "Scheme") -> dict[str, int]:
        split_axes(*self._form)  # refuses a layout that names no axes
        return checked_sizes(self.axes, shape, where)


def factor_all(
    schemes: Sequence[Scheme], kernels: Sequence[jax.Array]
) -> list[tuple[jax.Array, ...]]:
    """Factors of many kernels, each as `Scheme.factor` gives them; kernels with values are done
    side by side."""
    # A float64 array of NumPy takes the widest type that is enabled.
    pairs = zip(schemes, kernels, strict=True)
    kernels = [jnp.asarray(as_kernel(kernel, type(own).__name__)) for own, kernel in pairs]
    places, jobs = list(map(place_of, kernels)), []
    for scheme, kernel, where in zip(schemes, kernels, places, strict=True):
        scheme = scheme.checked(kernel.shape, type(scheme).__name__)
        given: Any = np.asarray(kernel) if where else kernel
        jobs.append(
            functools.partial(scheme.factors, given, jnp.promote_types(kernel.dtype, jnp.float32))
        )

    def place(index: int, factors: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        if (where := places[index]) is None:
            return factors
        if not kernels[index].committed:  # then the factors may go where other arrays are, too
            return tuple(map(jnp.asarray, factors))
        scheme, ndim = schemes[index], kernels[index].ndim
        return jax.device_put(factors, scheme.shardings(where, ndim))

    cores = None if all(places) else 1  # what JAX traces belongs to this thread
    return side_by_side(jobs, [kernel.size for kernel in kernels], place, cores)


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
        the values from index K on, and its Frobenius error is the root of the sum of the squares of
        these values.

    Raises:
        ValueError: the kernel is no array of floating-point numbers, or the layout, the form or the
            groups do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> [round(value) for value in spectrum(jnp.ones((3, 3, 2, 2)))[0].tolist()]
        [6, 0, 0, 0, 0, 0]
    """
    kernel = as_kernel(kernel, "spectrum")
    split_axes(axes, first)
    check_groups(groups, checked_sizes(axes, kernel.shape, "spectrum"), axes, "spectrum")
    spread = to_pair(wide(gathered(kernel)), axes, first)
    return jnp.linalg.svd(to_matrix(spread, groups), compute_uv=False)
