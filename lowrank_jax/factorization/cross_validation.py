"""How far a layer's data support a fit: factors measured on images they were not fitted to."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from lowrank_jax.factorization import whitening
from lowrank_jax.factorization.groups import Gap, Groups, mean_variance
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.factorization.parallel import together
from lowrank_jax.factorization.whitening import Pair, Target

Array = np.ndarray
SHRINKAGES = tuple(10.0**power for power in range(-4, 3))  # lambda by the mean variance of patches
PLAIN = math.inf  # the shrinkage of the plain factors
LIKELY = 3.0  # a likely shrinkage, times the samples for each dimension


@dataclasses.dataclass(frozen=True)
class Choice:
    """What held-out images say. Errors are relative to the variance of the wanted outputs.

    Attributes:
        shrinkage: lambda over the mean variance of the patches; infinite for the plain factors.
        held_out: error of factors of that shrinkage, fitted without the images that they are
            measured on.
        plain: error of the plain factors.
    """

    shrinkage: float
    held_out: float
    plain: float


def choose(layer: Groups, folds: Sequence[Moments], plain: list[Pair]) -> Choice:
    """The shrinkage of the least held-out error, or the plain factors.

    A shrinkage must win on every fold: folds of few images differ much, and the least of several
    sums would often be luck. The first factors are fitted with a likely shrinkage alone. Least
    squares for the second factors then cost little for every shrinkage.

    Args:
        layer: kernel and moments, by groups.
        folds: moments of disjoint sets of images.
        plain: factors of each group, fitted without data.
    """
    parts = _parts(layer, folds)
    variance = sum(part.count * part.variance for part in parts)
    limits = _by_fold(parts, lambda part: np.array([part.error(*plain[part.group])]))
    start = _likely(samples_for_dimension(layer, folds))
    errors = _by_fold(parts, lambda part: part.path(layer.scheme.ranks, start))
    return best_of(limits, errors, variance)


def best_of(limits: Float[Array, "f 1"], errors: Float[Array, "f s"], variance: float) -> Choice:
    """The shrinkage of the least error, if it wins on every fold of two or more.

    Args:
        limits: errors on each fold without data.
        errors: of each shrinkage.
        variance: of the wanted outputs, of all folds.
    """
    wins = (errors < limits).all(axis=0) & (len(errors) > 1)
    totals, limit = np.where(wins, errors.sum(axis=0), math.inf), limits.sum()
    best = int(np.argmin(totals))
    if math.isinf(totals[best]):
        return Choice(PLAIN, _relative(limit, variance), _relative(limit, variance))
    return Choice(SHRINKAGES[best], _relative(totals[best], variance), _relative(limit, variance))


def samples_for_dimension(layer: Groups, folds: Sequence[Moments]) -> float:
    """Patches for each dimension of a patch."""
    return sum(fold.count for fold in folds) / layer.own[0][..., 0].size


def _likely(samples: float) -> float:
    likely = LIKELY / samples
    return min(SHRINKAGES, key=lambda shrinkage: abs(math.log(shrinkage / likely)))


def _relative(error: float, variance: float) -> float:
    return max(float(error), 0.0) / variance if variance > 0 else 0.0


def _by_fold(
    parts: "list[_Part]", measure: "Callable[[_Part], Float[Array, 's']]"
) -> Float[Array, "f s"]:
    """Errors of the groups of each fold, added up by their patches."""
    folds = 1 + max(part.fold for part in parts)
    errors = together([functools.partial(measure, part) for part in parts])
    totals = np.zeros((folds, len(errors[0])))
    for part, error in zip(parts, errors, strict=True):
        totals[part.fold] += part.count * error
    return totals


def _parts(layer: Groups, folds: Sequence[Moments]) -> "list[_Part]":
    """The groups of all folds."""
    targets = together([functools.partial(layer.targets, fold) for fold in folds])
    rests = rests_of(folds)
    # The rest of two folds is the other one.
    fitted = targets[::-1] if len(folds) == 2 else [layer.targets(rest) for rest in rests]
    found = []
    for index, (fold, rest) in enumerate(zip(folds, rests, strict=True)):
        gaps = layer.gaps(fold, rest)
        for group, own in enumerate(layer.own):
            part = _Part(
                fold=index,
                group=group,
                count=fold.count,
                own=own,
                target=targets[index][group],
                rest=fitted[index][group],
                gap=gaps[group],
            )
            found.append(part)
    return found


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Part:
    """One group of one fold.

    Attributes:
        fold, group: their numbers.
        count: patches of the fold.
        own: the kernel.
        target: moments of the fold, on which factors are measured.
        rest: moments of the other folds, to which they are fitted.
        gap: how far the means of the fold are from those of the rest, which set the bias.
    """

    fold: int
    group: int
    count: int
    own: Float[Array, "b r n"]
    target: Target
    rest: Target
    gap: Gap

    @property
    def variance(self) -> float:
        """Of the wanted outputs, about the means of the rest."""
        return float(np.sum(self.target.variance + self.gap[1] ** 2))

    def error(self, first: Float[Array, "r K"], second: Float[Array, "b K n"]) -> float:
        """Error of factors on the fold."""
        return self._error(self.target.reduced(first), second, self.gap[0] @ first)

    def path(self, ranks: Sequence[int], start: float) -> Float[Array, "s"]:
        """Errors on the fold of fits to the rest with every shrinkage."""
        variance = mean_variance(self.rest)
        metric = whitening.kronecker(self.rest.blocks, start * variance)
        first = whitening.whitened_left(self.own, *metric, ranks[0])
        given, measured = self.rest.reduced(first), self.target.reduced(first)
        dense, gap, found = first.T @ self.own, self.gap[0] @ first, []
        for shrinkage in SHRINKAGES:
            ridged = given.ridged(dense, shrinkage * variance)
            second = whitening.best_second(ridged, ranks[1:])
            found.append(self._error(measured, second, gap))
        return np.array(found)

    def _error(
        self, target: Target, second: Float[Array, "b K n"], gap: Float[Array, "b K"]
    ) -> float:
        missed = self.gap[1] - np.einsum("xk,xkn->n", gap, second)
        return float(np.sum(target.error(second) + missed**2))


def rests_of(folds: Sequence[Moments]) -> list[Moments]:
    """The moments without each of some folds."""
    return [_without(folds, index) for index in range(len(folds))]


def _without(folds: Sequence[Moments], index: int) -> Moments:
    """The moments of the other folds; where there are none, of this one."""
    kept = [fold for other, fold in enumerate(folds) if other != index]
    return functools.reduce(Moments.__add__, kept or folds)
