"""The factors of one layer fitted to what it sees, as far as its data bear it.

The closed form of `whitening` is exact for the moments that it is given. With few images these say
little of other images, and the fit would be worse than no fit, worst where there are about as many
samples as dimensions. So a ridge pulls it towards the dense kernel, C + lambda I and R + lambda W:
with lambda to infinity the answer is the plain truncated SVD. Factors that are fitted without one
fold of the images are measured on it, which chooses lambda, or the plain factors.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float
from threadpoolctl import ThreadpoolController

from lowrank_jax.factorization import whitening
from lowrank_jax.factorization.layout import from_pair, split_axes
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.factorization.whitening import TINY, Pair, Target

Array = np.ndarray
Gap = tuple[Float[Array, "b _"], Float[Array, "n"]]  # of inputs, r or K a tap, and of outputs
SHRINKAGES = tuple(10.0**power for power in range(-4, 3))  # lambda by the mean variance of patches
FEW = 5  # samples for each dimension; below, a fit gains much from more images
LIKELY = 3.0  # a likely shrinkage, times the samples for each dimension
ONE_CORE = 1024  # dimensions of a patch up to which one core is enough
PLAIN = math.inf  # the shrinkage of the plain factors
UNIMPORTANT = 1e-6  # of the most important output; outputs below count as this


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """The two kernels of a layer, and how far the data bore them.

    Errors are mean squared errors of the outputs on images that were not fitted to, each output by
    its importance, relative to the variance of the outputs.

    Attributes:
        first, second: kernels as `Separable.factor` lays them out, float64.
        shrinkage: lambda by the mean variance of the patches; infinite for plain factors.
        held_out: error of such factors, fitted without the images that they are measured on, and
            before the sweeps, which lower it.
        plain: error of the plain factors.
        samples: patches for each dimension of a patch.
    """

    first: Array
    second: Array
    shrinkage: float
    held_out: float
    plain: float
    samples: float

    @property
    def is_plain(self) -> bool:
        """Whether no fit won on held-out images, so that the factors are the plain ones."""
        return math.isinf(self.shrinkage)


def fit_layer(
    kernel: Array,
    folds: Sequence[Moments],
    scheme: Separable,
    scale: Float[Array, "n"] | None = None,
    sweeps: int = 1,
) -> Fit:
    """The factors of a kernel that give the wanted outputs best, as far as held-out data tell.

    Args:
        kernel: the dense kernel, in the layout of the scheme.
        folds: moments of disjoint sets of images, such as the even and the odd ones. With one fold
            nothing can be held out, and the factors are the plain ones.
        scheme: of the layer.
        scale: importance of each output channel; ones if None.
        sweeps: alternating refinements of the two factors.
    """
    layer = _Layer(np.asarray(kernel, np.float64), scheme, scale)
    with _cores(layer.own[0][..., 0].size):
        return _fitted(layer, folds, sweeps)


def _fitted(layer: "_Layer", folds: Sequence[Moments], sweeps: int) -> Fit:
    trial, plain = _Trial(layer, folds), layer.plain()
    limit = trial.error(plain)
    shrinkage, held_out = trial.choose() if len(folds) > 1 else (PLAIN, limit)
    if held_out < limit:
        targets = layer.targets(functools.reduce(Moments.__add__, folds))
        shrinkage *= 1 - 1 / len(folds)  # a ridge falls with the samples, of which there are more
        kernels = layer.kernels(layer.fit(targets, shrinkage, sweeps))
    else:
        shrinkage, held_out, kernels = PLAIN, limit, layer.kernels(plain)
    return Fit(
        first=kernels[0],
        second=kernels[1],
        shrinkage=shrinkage,
        held_out=held_out,
        plain=limit,
        samples=trial.samples,
    )


def whitened_spectrum(
    kernel: Array,
    moments: Moments,
    scheme: Separable,
    scale: Float[Array, "n"] | None = None,
) -> Float[Array, "g k"]:
    """Singular values of the whitened matrix of each group: the errors of the outputs.

    Args:
        kernel, scheme, scale: as in `fit_layer`; the rank is not used.
        moments: of all images.
    """
    layer = _Layer(np.asarray(kernel, np.float64), scheme, scale)
    rows = []
    for own, target, weights in zip(layer.own, layer.targets(moments), layer.weights, strict=True):
        ridge = SHRINKAGES[0] * _mean_variance(target)
        matrix, _ = whitening.whitened(own * weights, *whitening.kronecker(target.blocks, ridge))
        rows.append(scipy.linalg.svdvals(matrix, overwrite_a=True, check_finite=False))
    return np.stack(rows)


class _Trial:
    """Fits to all folds but one, measured on that one.

    Attributes:
        samples: patches for each dimension of a patch.
        parts: one for each fold and group.
    """

    def __init__(self, layer: "_Layer", folds: Sequence[Moments]) -> None:
        self.rank = layer.scheme.rank
        self.samples = sum(fold.count for fold in folds) / layer.own[0][..., 0].size
        targets = [layer.targets(fold) for fold in folds]
        rests = [_without(folds, index) for index in range(len(folds))]
        # The rest of two folds is the other one.
        fitted = targets[::-1] if len(folds) == 2 else [layer.targets(rest) for rest in rests]
        self.parts = [
            _Part(group, folds[index].count, own, layer.weights[group], target, given, gap)
            for index, rest in enumerate(rests)
            for group, (own, target, given, gap) in enumerate(
                zip(
                    layer.own,
                    targets[index],
                    fitted[index],
                    layer.gaps(folds[index], rest),
                    strict=True,
                )
            )
        ]
        self.variance = sum(part.count * part.variance for part in self.parts)

    def choose(self) -> tuple[float, float]:
        """The shrinkage of the least held-out error, and that error.

        The first factors are those of a likely shrinkage; least squares for the second ones then
        cost little for every shrinkage.
        """
        likely = LIKELY / self.samples
        start = min(SHRINKAGES, key=lambda shrinkage: abs(math.log(shrinkage / likely)))
        total = sum(part.count * part.path(self.rank, start) for part in self.parts)
        errors = self._relative(total)
        best = int(np.argmin(errors))
        return SHRINKAGES[best], float(errors[best])

    def error(self, pairs: list[Pair]) -> float:
        """Error of factors of each group that were not fitted to any fold."""
        total = sum(part.count * part.error(*pairs[part.group]) for part in self.parts)
        return float(self._relative(total))

    def _relative(self, error: Any) -> Any:
        """Errors by the variance of the wanted outputs."""
        return np.maximum(error, 0) / (self.variance if self.variance > 0 else math.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """One group of one fold.

    Attributes:
        group: its number.
        count: patches of the fold.
        own: the kernel.
        weights: importance of the outputs.
        target: moments of the fold, on which factors are measured.
        rest: moments of the other folds, to which they are fitted.
        gap: how far the means of the fold are from those of the rest, which set the bias.
    """

    group: int
    count: int
    own: Float[Array, "b r n"]
    weights: Float[Array, "n"]
    target: Target
    rest: Target
    gap: Gap

    @property
    def variance(self) -> float:
        """Of the wanted outputs, about the means of the rest."""
        return self._weighted(self.target.variance + self.gap[1] ** 2)

    def error(self, first: Float[Array, "r K"], second: Float[Array, "b K n"]) -> float:
        """Error of factors on the fold."""
        return self._error(self.target.reduced(first), second, self.gap[0] @ first)

    def path(self, rank: int, start: float) -> Float[Array, "s"]:
        """Errors on the fold of fits to the rest with every shrinkage."""
        variance = _mean_variance(self.rest)
        metric = whitening.kronecker(self.rest.blocks, start * variance)
        first = whitening.whitened_left(self.own * self.weights, *metric, rank)
        given, measured = self.rest.reduced(first), self.target.reduced(first)
        dense, gap, found = first.T @ self.own, self.gap[0] @ first, []
        for shrinkage in SHRINKAGES:
            second = whitening.least_squares(given.ridged(dense, shrinkage * variance))
            found.append(self._error(measured, second, gap))
        return np.array(found)

    def _error(
        self, target: Target, second: Float[Array, "b K n"], gap: Float[Array, "b K"]
    ) -> float:
        missed = self.gap[1] - np.einsum("xk,xkn->n", gap, second)
        return self._weighted(target.error(second) + missed**2)

    def _weighted(self, errors: Float[Array, "n"]) -> float:
        return float(self.weights**2 @ errors)


def _cores(size: int) -> AbstractContextManager:
    """One core for patches of few dimensions.

    There more threads gain nothing, and those of two libraries, or of two programs, wait for each
    other most of the time.
    """
    return nullcontext() if size > ONE_CORE else _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> ThreadpoolController:
    """The numerical libraries of this process."""
    return ThreadpoolController()


def _without(folds: Sequence[Moments], index: int) -> Moments:
    """The moments of the other folds; where there are none, of this one."""
    kept = [fold for other, fold in enumerate(folds) if other != index]
    return functools.reduce(Moments.__add__, kept or folds)


class _Layer:
    """One layer, with its kernel and its moments in the order of `whitening`, by groups.

    Attributes:
        own: kernel (b, r, n) of each group.
        weights: importance of the outputs (n,) of each group.
    """

    def __init__(self, kernel: Array, scheme: Separable, scale: Float[Array, "n"] | None) -> None:
        self.scheme, self.sizes = scheme, dict(zip(scheme.axes, kernel.shape, strict=True))
        self.one, self.two = split_axes(scheme.axes, scheme.first)
        self.order = self.two + self.one + "I"
        self.taps = math.prod(self.sizes[letter] for letter in self.two)
        self.weights = _importance(scale, self.sizes["O"]).reshape(scheme.groups, -1)
        moved = kernel.transpose([scheme.axes.index(letter) for letter in self.order + "O"])
        split = moved.reshape(self.taps, -1, *self.weights.shape)
        self.own = split.transpose(2, 0, 1, 3)

    def plain(self) -> list[Pair]:
        """The factors of the truncated SVD of each group's kernel."""
        return [whitening.plain(own, self.scheme.rank) for own in self.own]

    def fit(self, targets: list[Target], shrinkage: float, sweeps: int) -> list[Pair]:
        """The factors of each group with a ridge towards its kernel."""
        pairs = []
        for own, target, weights in zip(self.own, targets, self.weights, strict=True):
            ridged = target.ridged(own, shrinkage * _mean_variance(target))
            start = whitening.least_squares(ridged)
            pairs.append(whitening.fit(start, ridged, self.scheme.rank, weights, sweeps))
        return pairs

    def targets(self, moments: Moments) -> list[Target]:
        """What each group is to be fitted to."""
        found = []
        covariances, crosses, variances = moments.covariance, moments.cross, moments.variance
        for group, cross in enumerate(crosses):
            covariance = self._arranged(self._arranged(covariances[group]).T)
            found.append(Target(covariance, self._arranged(cross), variances[group], self.taps))
        return found

    def gaps(self, fold: Moments, rest: Moments) -> list[Gap]:
        """How far the mean patch (b, r) and output (n,) of a fold are from those of the rest."""
        dx, dy = fold.mean_x - rest.mean_x, fold.mean_y - rest.mean_y
        rows = [self._arranged(part[:, None]).reshape(self.taps, -1) for part in dx]
        return list(zip(rows, dy, strict=True))

    def _arranged(self, flat: Float[Array, "p m"]) -> Float[Array, "p m"]:
        """Brings patches from the stored order to taps of the second, of the first, channels."""
        stored = [letter for letter in self.scheme.axes if letter != "O"]
        spread = flat.reshape(*(self.sizes[letter] for letter in stored), -1)
        moved = spread.transpose(*(stored.index(letter) for letter in self.order), len(stored))
        return moved.reshape(flat.shape)

    def kernels(self, pairs: list) -> tuple[Array, Array]:
        """The two kernels of the factors of all groups."""
        pairs = [whitening.balance(*pair) for pair in pairs]
        channels = self.sizes["I"]
        first = np.concatenate([v.reshape(-1, 1, channels, v.shape[-1]) for v, _ in pairs], -1)
        second = np.concatenate([h[None] for _, h in pairs], -1)
        return self._placed(first, self.one), self._placed(second, self.two)

    def _placed(self, factor: Float[Array, "a b c n"], own: str) -> Array:
        sizes = {letter: self.sizes[letter] for letter in own}
        return from_pair(factor, self.scheme.axes, self.scheme.first, sizes)


def _mean_variance(target: Target) -> float:
    """Of the entries of the patches; one where the patches do not vary."""
    mean = float(np.trace(target.covariance)) / len(target.covariance)
    return mean if mean > TINY else 1.0


def _importance(scale: Float[Array, "n"] | None, width: int) -> Float[Array, "n"]:
    if scale is None or not np.max(scale) > 0:
        return np.ones(width)
    scale = np.asarray(scale, np.float64)
    return np.maximum(scale, UNIMPORTANT * scale.max())
