"""The kernels of one layer fitted to what it sees: from moments in the stored layout to factors and
back."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.moments import Moments
from lowrank_jax.factorization.layout import from_pair, split_axes
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.factorization.whitening import fit, solve, whitened

SHRINKAGE = 1e-4


def fit_layer(
    kernel: np.ndarray,
    found: Moments,
    scheme: Separable,
    scale: np.ndarray | None = None,
    sweeps: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """The two kernels of a layer, fitted to the moments of its inputs and of the outputs that it is
    to give.

    Args:
        kernel: the dense kernel in Flax's layout, float64.
        found: moments of the layer's patches.
        scheme: of the layer, in the same layout.
        scale: importance of each output channel; ones if None.
        sweeps: alternating refinements.

    Returns:
        The first and the second kernel as `Separable.factor` lays them out.
    """
    firsts, seconds = [], []
    for own, covariance, cross, weights in layer_groups(kernel, found, scheme, scale):
        covariance, cross = shrink(own, covariance, cross)
        v, h = fit(
            least_squares(covariance, cross), covariance, cross, scheme.rank, weights, sweeps
        )
        firsts.append(v)
        seconds.append(h)
    return _kernels(firsts, seconds, scheme, kernel.shape)


def whitened_spectrum(
    kernel: np.ndarray, found: Moments, scheme: Separable, scale=None
) -> np.ndarray:
    """Singular values (groups, max_rank) of the whitened matrix of each group: the errors of the
    outputs.

    Args:
        kernel, found, scheme, scale: as in `fit_layer`; the rank is not used.
    """
    rows = []
    for own, covariance, cross, weights in layer_groups(kernel, found, scheme, scale):
        rows.append(whitened(own, shrink(own, covariance, cross)[0], weights)[1])
    return np.stack(rows)


def layer_groups(
    kernel: np.ndarray, found: Moments, scheme: Separable, scale: np.ndarray | None
) -> Iterator[tuple]:
    """Kernel (a, b, c, n), covariance (a, b, c, a, b, c), cross (a, b, c, n) and weights (n,) of
    each group."""
    sizes = dict(zip(scheme.axes, kernel.shape, strict=True))
    stored = [letter for letter in scheme.axes if letter != "O"]
    one, two = split_axes(scheme.axes, scheme.first)
    shape = (*(math.prod(sizes[x] for x in part) for part in (one, two)), sizes["I"])
    size, width = math.prod(shape), sizes["O"] // scheme.groups

    def arrange(flat: np.ndarray) -> np.ndarray:
        """Brings a patch axis from the stored order (spatial, channels) to (a, b, c)."""
        spread = flat.reshape(*(sizes[x] for x in stored), *flat.shape[1:])
        moved = spread.transpose(
            *(stored.index(x) for x in one + two + "I"), *range(len(stored), spread.ndim)
        )
        return moved.reshape(size, *flat.shape[1:])

    covariances, crosses = found.covariance, found.cross
    for g in range(scheme.groups):
        part = slice(g * width, (g + 1) * width)
        own = arrange(kernel.reshape(-1, sizes["O"])[:, part]).reshape(*shape, -1)
        covariance = arrange(arrange(covariances[g]).T).reshape(*shape, *shape)
        weights = None if scale is None else scale[part]
        yield own, covariance, arrange(crosses[g]).reshape(*shape, -1), weights


def shrink(
    kernel: np.ndarray, covariance: np.ndarray, cross: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The moments with a little of the identity added, and of the dense kernel as its answer."""
    size = int(np.prod(kernel.shape[:-1]))
    flat = covariance.reshape(size, size).copy()
    ridge = SHRINKAGE * np.trace(flat) / size
    flat[np.diag_indices(size)] += ridge
    wanted = cross.reshape(size, -1) + ridge * kernel.reshape(size, -1)
    return flat.reshape(covariance.shape), wanted.reshape(kernel.shape)


def least_squares(covariance: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """The kernel of full rank that gives the wanted outputs best."""
    size = int(np.prod(cross.shape[:-1]))
    return solve(covariance.reshape(size, size), cross.reshape(size, -1)).reshape(cross.shape)


def _kernels(
    firsts: list, seconds: list, scheme: Separable, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    sizes = dict(zip(scheme.axes, shape, strict=True))
    one, two = split_axes(scheme.axes, scheme.first)
    first = np.concatenate([v[:, None] for v in firsts], -1)  # (a, 1, c, groups * K)
    second = np.concatenate([h.transpose(1, 0, 2)[None] for h in seconds], -1)  # (1, b, K, n)

    def place(pair: np.ndarray, own: str) -> jax.Array:
        return from_pair(
            jnp.asarray(pair), scheme.axes, scheme.first, {letter: sizes[letter] for letter in own}
        )

    return place(first, one), place(second, two)
