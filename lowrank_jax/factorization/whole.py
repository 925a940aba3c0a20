"""A kernel that stays dense, fitted to what its layer sees: ridge regression towards itself.

With C the covariance of the patches and R that with the wanted outputs, the kernel is
(C + lambda I)^-1 (R + lambda W). Held-out images choose lambda, or the kernel W as it is. All
groups are solved at once, because a depthwise convolution has a thousand small ones.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lowrank_jax.factorization.axes import patch_axes, spatial_axes, width_of
from lowrank_jax.factorization.channel import Channel
from lowrank_jax.factorization.cross_validation import SHRINKAGES, Choice, best_of, rests_of
from lowrank_jax.factorization.fitting import Fit
from lowrank_jax.factorization.layout import to_matrix, to_pair
from lowrank_jax.factorization.matrix import Matrix
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.factorization.parallel import one_core_each
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.solving import TINY, solve

Array = np.ndarray
Kernels = Float[np.ndarray, "g p m"]


def whole_scheme(axes: str, shape: Sequence[int], groups: int = 1) -> Scheme:
    """The scheme whose first factor is a kernel itself, beside an identity.

    Example:
        >>> whole_scheme("HWIO", (3, 3, 8, 16)).shapes((3, 3, 8, 16))
        ((3, 3, 8, 16), (1, 1, 16, 16))
    """
    rank = width_of(axes, shape) // groups
    return Channel(rank, groups, axes) if spatial_axes(axes) else Matrix(rank, groups, axes)


def fit_whole(
    kernel: Array, folds: Sequence[Moments], scheme: Scheme, known: Fit | None = None
) -> Fit:
    """The kernel that gives the wanted outputs best, as far as held-out data tell.

    Args:
        kernel: the dense kernel, in the layout of the scheme.
        folds: moments of disjoint sets of images, as in `fit_layer`; with one the kernel stays.
        scheme: its `whole_scheme`.
        known: a fit to other outputs, whose shrinkage is taken.

    Returns:
        A fit whose first factor is the kernel.
    """
    layer = _Layer(np.asarray(kernel, np.float64), scheme)
    with one_core_each():
        known = known or layer.unfitted(folds)
        found = layer.own
        if not known.is_plain:
            whole = layer.seen(functools.reduce(Moments.__add__, folds))
            found = whole.solved(layer.own, known.shrinkage)
    return dataclasses.replace(known, **layer.factors(found))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Seen:
    """What some moments say, in the order of the kernel's entries.

    Attributes:
        count: patches.
        mean_x, mean_y: mean patch and outputs.
        covariance, cross: of the patches, and with the outputs.
        variance: of all outputs.
    """

    count: int
    mean_x: Float[Array, "g p"]
    mean_y: Float[Array, "g m"]
    covariance: Float[Array, "g p p"]
    cross: Float[Array, "g p m"]
    variance: float

    def solved(self, own: Kernels, shrinkage: float) -> Kernels:
        """The kernel of a shrinkage towards a given one."""
        size = own.shape[1]
        mean = np.trace(self.covariance, axis1=1, axis2=2) / size
        ridge = shrinkage * np.where(mean > TINY, mean, 1.0)[:, None, None]
        covariance, right = self.covariance + ridge * np.eye(size), self.cross + ridge * own
        if len(covariance) == 1:
            return solve(covariance[0], right[0])[None]
        return np.linalg.solve(covariance, right)

    def error(self, kernel: Kernels, rest: "_Seen") -> float:
        """Squared error of a kernel whose bias is that of other moments."""
        squares = kernel * (self.covariance @ kernel - 2 * self.cross)
        shift = (self.mean_x - rest.mean_x)[..., None]
        missed = self.mean_y - rest.mean_y - np.sum(shift * kernel, axis=1)
        return self.count * (self.variance + float(squares.sum() + np.sum(missed**2)))

    def spread(self, rest: "_Seen") -> float:
        """Squared outputs about the means of other moments."""
        return self.count * (self.variance + float(np.sum((self.mean_y - rest.mean_y) ** 2)))


class _Layer:
    """A kernel by groups, its patches in the order of its matrix."""

    def __init__(self, kernel: Array, scheme: Scheme) -> None:
        self.scheme, self.shape = scheme, kernel.shape
        self.own: Kernels = to_matrix(to_pair(kernel, scheme.axes, scheme.first), scheme.groups)
        stored, order = patch_axes(scheme.axes, scheme.first)
        sizes = dict(zip(scheme.axes, kernel.shape, strict=True))
        places = np.arange(self.own.shape[1]).reshape([sizes[letter] for letter in stored])
        # A slice, because a copy of a covariance would be as large.
        moved = places.transpose([stored.index(letter) for letter in order]).ravel()
        self._order: Any = slice(None) if stored == order else moved

    def factors(self, kernel: Kernels) -> dict[str, Any]:
        """A kernel of the layer and the identity beside it, as a fit holds them."""
        eye = np.eye(kernel.shape[2])
        beside = np.broadcast_to(eye, (len(kernel), *eye.shape))
        first, second = self.scheme.fold(kernel, beside, self.shape)
        return {"first": first, "second": second}

    def seen(self, moments: Moments) -> _Seen:
        return _Seen(
            count=moments.count,
            mean_x=moments.mean_x[:, self._order],
            mean_y=moments.mean_y,
            covariance=moments.covariance[:, self._order][:, :, self._order],
            cross=moments.cross[:, self._order],
            variance=float(moments.variance.sum()),
        )

    def unfitted(self, folds: Sequence[Moments]) -> Fit:
        """The kernel as it is, with the shrinkage of the least held-out error."""
        choice = self._choose(folds)
        return Fit(
            **self.factors(self.own),
            bases=(),
            # The ridge falls with the samples; the choice was made with one fold less.
            shrinkage=choice.shrinkage * (1 - 1 / max(len(folds), 2)),
            held_out=choice.held_out,
            plain=choice.plain,
            samples=sum(fold.count for fold in folds) / self.own.shape[1],
        )

    def _choose(self, folds: Sequence[Moments]) -> Choice:
        rows, variance = [], 0.0
        for fold, rest in zip(folds, rests_of(folds), strict=True):
            measured, given = self.seen(fold), self.seen(rest)
            kernels = (given.solved(self.own, shrinkage) for shrinkage in SHRINKAGES)
            rows.append([measured.error(own, given) for own in (self.own, *kernels)])
            variance += measured.spread(given)
        errors = np.array(rows)
        return best_of(errors[:, :1], errors[:, 1:], variance)
