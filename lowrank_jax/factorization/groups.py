"""A layer's kernel and moments in the order of `whitening`, one group after the other."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lowrank_jax.factorization import whitening
from lowrank_jax.factorization.axes import INPUTS, OUTPUTS, only, patch_axes, split_axes, width_of
from lowrank_jax.factorization.importance import Importance
from lowrank_jax.factorization.layout import merged
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.solving import TINY
from lowrank_jax.factorization.whitening import Pair, Target

Array = np.ndarray
FEW_STEPS = 2  # of conjugate gradients, for factors that were fitted before
Gap = tuple[Float[Array, "b _"], Float[Array, "n"]]  # of inputs, r or K a tap, and of outputs


class Groups:
    """One layer, with its kernel and its moments in the order of `whitening`, by groups.

    Outputs are weighted by their importance, in the kernel as in the moments.

    Attributes:
        own: kernel (b, r, n) of each group.
        importance: of the outputs of each group.
    """

    def __init__(self, kernel: Array, scheme: Scheme, importance: Importance | None = None) -> None:
        self.scheme, self.sizes = scheme, dict(zip(scheme.axes, kernel.shape, strict=True))
        self.stored, self.order = patch_axes(scheme.axes, scheme.first)
        _, two = split_axes(scheme.axes, scheme.first)
        outputs = only(scheme.axes, OUTPUTS)
        self.taps = math.prod(self.sizes[letter] for letter in two)
        width = width_of(scheme.axes, kernel.shape)
        importance = importance or Importance.even(width)
        self.importance = importance.of_groups(scheme.groups)
        parts = merged(kernel, scheme.axes, [self.order, outputs])
        split = parts.reshape(self.taps, -1, scheme.groups, width // scheme.groups)
        self.dense = split.transpose(2, 0, 1, 3)
        pairs = zip(self.dense, self.importance, strict=True)
        self.own = [weights.weighted(dense) for dense, weights in pairs]

    def plain(self) -> list[Pair]:
        """The factors of each group's kernel by its scheme, without data."""
        pairs = zip(self.dense, self.importance, strict=True)
        return [self._plain(dense, weights) for dense, weights in pairs]

    def _plain(self, dense: Float[Array, "b r n"], weights: Importance) -> Pair:
        left, right = self.scheme.truncated(whitening.matrix_of(dense), self.taps)
        second = right.reshape(len(right), self.taps, -1).transpose(1, 0, 2)
        return left, weights.weighted(second)

    def fit(self, targets: list[Target], shrinkage: float, sweeps: int) -> list[Pair]:
        """The factors of each group with a ridge towards its kernel."""
        pairs = []
        for own, target in zip(self.own, targets, strict=True):
            ridged = target.ridged(own, shrinkage * mean_variance(target))
            start = whitening.least_squares(ridged)
            pairs.append(whitening.fit(start, ridged, self.scheme.ranks, sweeps))
        return pairs

    def fit_again(
        self, bases: Sequence[Array], targets: list[Target], shrinkage: float, sweeps: int
    ) -> list[Pair]:
        """The factors of each group, from a first one on, with a ridge towards its kernel."""
        pairs = []
        for own, base, target in zip(self.own, bases, targets, strict=True):
            ridged = target.ridged(own, shrinkage * mean_variance(target))
            metric, ranks = whitening.kronecker(ridged.blocks), self.scheme.ranks
            pairs.append(whitening.alternated(base, ridged, metric, ranks, sweeps, FEW_STEPS))
        return pairs

    def targets(self, moments: Moments) -> list[Target]:
        """What each group is to be fitted to."""
        found = []
        for covariance, cross, variance in zip(
            self.of_groups(moments.covariance),
            self.of_groups(moments.cross, outputs=True),
            self.of_groups(moments.variance, outputs=True),
            strict=True,
        ):
            arranged = self.arranged_square(covariance)
            found.append(Target(arranged, self.arranged(cross), variance, self.taps))
        return found

    def of_groups(self, rows: Float[Array, "g ..."], outputs: bool = False) -> list[Array]:
        """The part of each group; the groups of a matrix read the same inputs."""
        if len(rows) == self.scheme.groups:
            return list(rows)
        shared = self.scheme.groups
        return np.split(rows[0], shared, axis=-1) if outputs else [rows[0]] * shared

    def gaps(self, fold: Moments, rest: Moments) -> list[Gap]:
        """How far the mean patch (b, r) and output (n,) of a fold are from those of the rest."""
        dx, dy = fold.mean_x - rest.mean_x, fold.mean_y - rest.mean_y
        rows = [self.arranged(part[:, None]).reshape(self.taps, -1) for part in self.of_groups(dx)]
        return list(zip(rows, self.of_groups(dy, outputs=True), strict=True))

    def arranged(self, flat: Float[Array, "p m"]) -> Float[Array, "p m"]:
        """Brings patches from the stored order to taps of the second, of the first, channels."""
        spread = flat.reshape(*(self.sizes[letter] for letter in self.stored), -1)
        moved = spread.transpose(*(self.stored.index(x) for x in self.order), len(self.stored))
        return moved.reshape(flat.shape)

    def arranged_square(self, square: Float[Array, "p p"]) -> Float[Array, "p p"]:
        """`arranged` for the rows and the columns of a covariance."""
        count = len(self.stored)
        spread = square.reshape([self.sizes[letter] for letter in self.stored] * 2)
        order = [self.stored.index(letter) for letter in self.order]
        return spread.transpose(*order, *(count + axis for axis in order)).reshape(square.shape)

    def kernels(self, pairs: list) -> tuple[Array, Array]:
        """The two kernels of the factors of all groups."""
        pairs = [
            whitening.balance(first, weights.restored(second))
            for (first, second), weights in zip(pairs, self.importance, strict=True)
        ]
        channels = math.prod(self.sizes[letter] for letter in only(self.scheme.axes, INPUTS))
        first = np.concatenate([v.reshape(-1, 1, channels, v.shape[-1]) for v, _ in pairs], -1)
        second = np.concatenate([h[None] for _, h in pairs], -1)
        return self.scheme.placed(first, 0, self.sizes), self.scheme.placed(second, 1, self.sizes)


def mean_variance(target: Target) -> float:
    """The mean variance of the patches' entries; one where the patches do not vary."""
    mean = float(np.trace(target.covariance)) / len(target.covariance)
    return mean if mean > TINY else 1.0
