"""A kernel that stays dense, fitted to what its layer sees: ridge regression towards itself.

With C the covariance of the patches and R that with the wanted outputs, the kernel is
(C + lambda I)^-1 (R + lambda W). Held-out images choose lambda, or the kernel W as it is. All
groups are solved at once, because a depthwise convolution has a thousand small ones.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

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
        known = known or layer.choice(folds)
        found = layer.solved(functools.reduce(Moments.__add__, folds), known.shrinkage)
    eye = np.eye(found.shape[2])
    first, second = scheme.fold(found, np.broadcast_to(eye, (len(found), *eye.shape)), kernel.shape)
    return dataclasses.replace(known, first=first, second=second)


class _Layer:
    """A kernel by groups, and moments in the order of its entries."""

    def __init__(self, kernel: Array, scheme: Scheme) -> None:
        self.own: Float[Array, "g p m"] = to_matrix(
            to_pair(kernel, scheme.axes, scheme.first), scheme.groups
        )
        stored, order = patch_axes(scheme.axes, scheme.first)
        sizes = dict(zip(scheme.axes, kernel.shape, strict=True))
        places = np.arange(self.own.shape[1]).reshape([sizes[letter] for letter in stored])
        self._order = places.transpose([stored.index(letter) for letter in order]).ravel()

    def choice(self, folds: Sequence[Moments]) -> Fit:
        """A fit whose kernel is that given, with the shrinkage of the least held-out error."""
        choice, count = self._choose(folds), sum(fold.count for fold in folds)
        return Fit(
            first=self.own,
            second=self.own,
            bases=(),
            # The ridge falls with the samples; the choice was made with one fold less.
            shrinkage=choice.shrinkage * (1 - 1 / max(len(folds), 2)),
            held_out=choice.held_out,
            plain=choice.plain,
            samples=count / self.own.shape[1],
        )

    def _choose(self, folds: Sequence[Moments]) -> Choice:
        rows = []
        for fold, rest in zip(folds, rests_of(folds), strict=True):
            kernels = [self.solved(rest, own) for own in SHRINKAGES]
            rows.append([self._error(fold, rest, own) for own in (self.own, *kernels)])
        variance = sum(
            fold.count * float(np.sum(fold.variance + (fold.mean_y - rest.mean_y) ** 2))
            for fold, rest in zip(folds, rests_of(folds), strict=True)
        )
        errors = np.array(rows)
        return best_of(errors[:, :1], errors[:, 1:], variance)

    def solved(self, moments: Moments, shrinkage: float) -> Float[Array, "g p m"]:
        """The kernel of a shrinkage."""
        if math.isinf(shrinkage):
            return self.own
        covariance, cross = self._squares(moments), self._arranged(moments.cross)
        size = covariance.shape[-1]
        mean = np.trace(covariance, axis1=1, axis2=2) / size
        ridge = shrinkage * np.where(mean > TINY, mean, 1.0)[:, None, None]
        right = cross + ridge * self.own
        covariance += ridge * np.eye(size)
        if len(covariance) == 1:
            return solve(covariance[0], right[0])[None]
        return np.linalg.solve(covariance, right)

    def _error(self, fold: Moments, rest: Moments, kernel: Float[Array, "g p m"]) -> float:
        """Squared error on a fold, whose bias is that of the rest."""
        squares = kernel * (self._squares(fold) @ kernel - 2 * self._arranged(fold.cross))
        gap = self._arranged((fold.mean_x - rest.mean_x)[..., None])
        missed = fold.mean_y - rest.mean_y - np.sum(gap * kernel, axis=1)
        return fold.count * float(np.sum(fold.variance) + squares.sum() + np.sum(missed**2))

    def _arranged(self, rows: Float[Array, "g p m"]) -> Float[Array, "g p m"]:
        return rows[:, self._order]

    def _squares(self, moments: Moments) -> Float[Array, "g p p"]:
        covariance = moments.covariance
        if np.array_equal(self._order, np.arange(len(self._order))):
            return covariance  # a copy would be as large
        return covariance[:, self._order][:, :, self._order]
