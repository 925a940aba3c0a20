"""The factors of one layer fitted to what the layer sees, as far as its data support a fit.

The closed form of `whitening` is exact for the moments that it is given. With few images the
moments say little of other images, and the fit would be worse than no fit, worst where there are
about as many samples as dimensions. So a ridge pulls it towards the dense kernel, C + lambda I and
R + lambda W: with lambda to infinity the answer is the plain truncated SVD. Factors that are fitted
without one fold of the images are measured on it, which chooses lambda, or the plain factors.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank_jax.factorization.cross_validation import choose, samples_for_dimension
from lowrank_jax.factorization.groups import Groups
from lowrank_jax.factorization.importance import Importance
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.factorization.parallel import one_core_each
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.whitening import Pair

Array = np.ndarray
FEW = 5  # samples for each dimension; below, a fit gains much from more images


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Fit:
    """The two kernels of a layer, and how far the data supported them.

    Errors are mean squared errors of the outputs on images that were not fitted to, weighted by
    their importance, relative to the variance of the outputs.

    Attributes:
        first, second: kernels as `Separable.factor` lays them out, float64.
        bases: the columns of the first factor of each group, in the order of `whitening`.
        shrinkage: lambda over the mean variance of the patches; infinite for plain factors.
        held_out: error of factors of that shrinkage, fitted without the images that they are
            measured on, and before the sweeps, which lower the error.
        plain: error of the plain factors.
        samples: patches for each dimension of a patch.
        closed, stepped: error of the outputs of the blocks that are trained together, the layer's
            among them, before and after gradient steps, on images that the steps did not see; equal
            where the steps did not help and the closed form stays; None without steps.
    """

    first: Array
    second: Array
    bases: Sequence[Array]
    shrinkage: float
    held_out: float
    plain: float
    samples: float
    closed: float | None = None
    stepped: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether no fit won on held-out images, so that the factors are the plain ones."""
        return math.isinf(self.shrinkage)


def fit_layer(
    kernel: Array,
    folds: Sequence[Moments],
    scheme: Scheme,
    importance: Importance | None = None,
    sweeps: int = 1,
) -> Fit:
    """The factors of a kernel that give the wanted outputs best, as far as held-out data tell.

    Args:
        kernel: the dense kernel, in the layout of the scheme.
        folds: moments of disjoint sets of images, such as the even and the odd ones, whose outputs
            are weighted by their importance. With one fold nothing can be held out, and the factors
            are the plain ones.
        scheme: the layer's scheme.
        importance: of the outputs; all count alike if None.
        sweeps: alternating refinements of the two factors.
    """
    layer = Groups(np.asarray(kernel, np.float64), scheme, importance)
    with one_core_each():
        return _fitted(layer, folds, sweeps)


def _kernels(layer: Groups, pairs: list[Pair]) -> dict[str, Any]:
    first, second = layer.kernels(pairs)
    return {"first": first, "second": second, "bases": [one for one, _ in pairs]}


def fit_again(
    kernel: Array,
    folds: Sequence[Moments],
    scheme: Scheme,
    importance: Importance,
    known: Fit,
    sweeps: int = 1,
) -> Fit:
    """The same fit to other outputs: it goes on from the factors, and its figures stay."""
    layer = Groups(np.asarray(kernel, np.float64), scheme, importance)
    with one_core_each():
        targets = layer.targets(functools.reduce(Moments.__add__, folds))
        pairs = layer.fit_again(known.bases, targets, known.shrinkage, sweeps)
    return dataclasses.replace(known, **_kernels(layer, pairs))


def _fitted(layer: Groups, folds: Sequence[Moments], sweeps: int) -> Fit:
    plain = layer.plain()
    choice = choose(layer, folds, plain)
    # The ridge falls with the samples; the choice was made with one fold less.
    shrinkage, pairs = choice.shrinkage, plain
    if not math.isinf(shrinkage):
        shrinkage *= 1 - 1 / len(folds)
        targets = layer.targets(functools.reduce(Moments.__add__, folds))
        pairs = layer.fit(targets, shrinkage, sweeps)
    return Fit(
        **_kernels(layer, pairs),
        shrinkage=shrinkage,
        held_out=choice.held_out,
        plain=choice.plain,
        samples=samples_for_dimension(layer, folds),
    )
