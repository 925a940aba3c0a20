"""What a plan needs of a layer: second moments of its outputs and of strips of its patches.

The covariance C of whole patches decides what a rank loses, and grows with the square of all taps.
A plan can do with less. With all taps in the first factor, the singular values of the whitened
matrix L^T W, with L L^T = C, are the roots of the eigenvalues of W^T C W, the covariance of the
outputs. With taps in both, C is taken as a Kronecker product of the mean covariance A of the strips
that the first factor sees, and the correlation B of the taps of the second.

Fewer samples than dimensions span a space in which a low rank loses nothing of them, and much of
other samples. So a covariance is shrunk towards that of inputs without any correlation, by the
share of their distance that is noise (Ledoit and Wolf, 2004; of Gaussian samples).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
import scipy.linalg
from jaxtyping import Float, Float64

from lowrank_jax.factorization import whitening
from lowrank_jax.factorization.axes import INPUTS, only, split_axes
from lowrank_jax.factorization.cross_validation import SHRINKAGES
from lowrank_jax.factorization.groups import Groups
from lowrank_jax.factorization.importance import Importance
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.solving import TINY

Array = np.ndarray
STILL = 1e-6  # a share of the squares that is rounding alone, of sums in float32


@dataclasses.dataclass(frozen=True, eq=False)
class Strips:
    """Sums over patches and outputs of one kernel, for each group of the channels.

    Sums of disjoint sets of images add up to the sums of both.

    Attributes:
        count: number of patches.
        samples: independent patches that would tell as much; neighbours in an image tell less.
        x: sum of the patches, each in the order in which the kernel stores its axes.
        y: sum of the outputs.
        yy: sum of the products of the outputs with each other; of their squares alone where no
            form needs more.
        strips: name of a form to the sum of the products of a strip with itself; each patch gives
            one strip, of its taps in turn.
        offsets: name of a form to the sum of the products of the strips at every two taps.
    """

    count: int
    samples: float
    x: Float64[Array, "g p"]
    y: Float64[Array, "g m"]
    yy: Float64[Array, "g m *m"]
    strips: Mapping[str, Float64[Array, "g r r"]]
    offsets: Mapping[str, Float64[Array, "g b b"]]

    def __add__(self, other: "Strips") -> "Strips":
        def both(one: Mapping[str, Array], two: Mapping[str, Array]) -> dict[str, Array]:
            return {first: one[first] + two[first] for first in one}

        return Strips(
            self.count + other.count,
            self.samples + other.samples,
            self.x + other.x,
            self.y + other.y,
            self.yy + other.yy,
            both(self.strips, other.strips),
            both(self.offsets, other.offsets),
        )

    @property
    def variance(self) -> Float64[Array, "g m"]:
        """Variance of each output about its `centre`."""
        return self._squares if not self.centre else self._variance

    @property
    def _variance(self) -> Float64[Array, "g m"]:
        """Rounding makes it no less than zero."""
        return np.maximum(self._squares - (self.y / self.count) ** 2, 0)

    @property
    def _squares(self) -> Float64[Array, "g m"]:
        squares = self.yy if self.yy.ndim == 2 else np.diagonal(self.yy, axis1=1, axis2=2)
        return squares / self.count

    @functools.cached_property
    def centre(self) -> float:
        """1 where covariances are about the means, 0 where they are about zero.

        The outputs of one image, or of equal ones, have no variance, and their means tell more.
        """
        return float(self._variance.sum() > STILL * self._squares.sum())

    @property
    def output_covariance(self) -> Float64[Array, "g m m"]:
        """Covariance of the outputs of each group."""
        mean = self.centre * self.y / self.count
        return self.yy / self.count - mean[:, :, None] * mean[:, None, :]


def whitened_spectrum(
    kernel: Array, strips: Strips, scheme: Scheme, importance: Importance | None = None
) -> Float[Array, "g k"]:
    """Singular values of the whitened matrix of each group: the errors of the outputs.

    Args:
        kernel: the dense kernel, in the layout of the scheme.
        strips: the layer's sums.
        scheme: its rank is not used.
        importance: of the outputs; all count alike if None.
    """
    layer = Groups(np.asarray(kernel, np.float64), scheme, importance)
    if scheme.first in strips.strips:
        squares = _of_strips(layer, strips)
    else:
        squares = _of_outputs(layer, strips)
    limit = min(layer.dense.shape[2], layer.dense.shape[1] * layer.dense.shape[3])
    return np.sqrt(np.maximum(np.stack(squares)[:, ::-1][:, :limit], 0))


def _of_outputs(layer: Groups, strips: Strips) -> list[Array]:
    """Eigenvalues of the covariance of the outputs of each group, weighted by their importance."""
    covariances, found = _blocks(strips.output_covariance, layer.scheme.groups), []
    for covariance, own, weights in zip(covariances, layer.own, layer.importance, strict=True):
        weighted = weights.weighted(weights.weighted(covariance).T)
        flat = own.reshape(-1, own.shape[-1])
        found.append(_eigenvalues(shrunk(weighted, flat.T @ flat, strips.samples)))
    return found


def shrunk(
    covariance: Float[Array, "n n"], prior: Float[Array, "n n"], samples: float
) -> Float[Array, "n n"]:
    """A covariance of few samples, nearer to what it would be without data.

    Args:
        covariance: of the samples.
        prior: the covariance that is expected without data, up to a factor.
        samples: how many there are that tell something of their own.

    Example:
        >>> one = np.outer([1.0, 1.0], [1.0, 1.0])
        >>> [round(float(shrunk(one, np.eye(2), count)[0, 1]), 2) for count in (10, 10**6)]
        [0.6, 1.0]
    """
    trace, whole = np.trace(covariance), np.trace(prior)
    if not whole > TINY:
        return covariance
    towards = prior * (trace / whole)
    noise = (np.sum(covariance**2) + trace**2) / samples
    distance = np.sum((covariance - towards) ** 2)
    share = noise / distance if noise < distance else 1.0
    return covariance + share * (towards - covariance)


def _blocks(covariances: Float[Array, "g m m"], groups: int) -> list[Array]:
    """The blocks of the outputs that have factors of their own."""
    if len(covariances) == groups:
        return list(covariances)
    width = covariances.shape[-1] // groups
    ranges = [slice(start * width, (start + 1) * width) for start in range(groups)]
    return [covariances[0, own, own] for own in ranges]


def _of_strips(layer: Groups, strips: Strips) -> list[Array]:
    found = []
    every = zip(*(layer.of_groups(x) for x in _centred(layer, strips)), strict=True)
    for own, (strip, offset) in zip(layer.own, every, strict=True):
        strip = shrunk(strip, np.eye(len(strip)), strips.samples)
        ridge = SHRINKAGES[0] * max(np.trace(offset) / layer.taps / len(strip), TINY)
        matrix, _ = whitening.whitened(own, *whitening.ridged(strip, offset, ridge))
        small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        found.append(_eigenvalues(small @ small.T))
    return found


def _centred(layer: Groups, strips: Strips) -> tuple[Array, Array]:
    """The mean covariance of the strips, and the covariance of the taps, of each group."""
    first = layer.scheme.first
    means = [
        layer.arranged(row[:, None]).reshape(layer.taps, -1)
        for row in strips.centre * strips.x / strips.count
    ]
    pairs = zip(strips.strips[first] / strips.count, means, strict=True)
    covariances = [own - mean.T @ mean / layer.taps for own, mean in pairs]
    pairs = zip(strips.offsets[first] / strips.count, means, strict=True)
    return np.stack(covariances), np.stack([own - mean @ mean.T for own, mean in pairs])


def _eigenvalues(matrix: Float[Array, "n n"]) -> Float[Array, "n"]:
    """In ascending order."""
    return scipy.linalg.eigvalsh(matrix, overwrite_a=True, check_finite=False, driver="evr")


def needed(axes: str, sizes: Mapping[str, int], first: str, outputs: int) -> bool:
    """Whether a form needs strips, or can do with the covariance of so many outputs of a group."""
    one, two = split_axes(axes, first)
    rows = math.prod(sizes[letter] for letter in one + only(axes, INPUTS))
    return any(sizes[letter] > 1 for letter in two) or rows < outputs
