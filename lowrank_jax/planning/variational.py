"""The rank that empirical variational Bayes finds in a noisy matrix, in closed form."""

import numpy as np


def evbmf_rank(values: np.ndarray, columns: int) -> int:
    """Number of singular values that stand out of the noise.

    Empirical variational Bayesian matrix factorisation of Nakajima, Sugiyama, Babacan and Tomioka,
    2013 ("Global analytic solution of fully-observed variational Bayesian matrix factorization",
    JMLR 14). For noise of variance v, an L x M matrix with a = L / M keeps the singular values
    above sqrt(M v (1 + t) (1 + a / t)), where t = 2.5129 sqrt(a). Of all variances v has the
    smallest free energy.

    Args:
        values: all L singular values, largest first.
        columns: M, the longer side of the matrix.

    Returns:
        The rank, from 0 to L.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> signal = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 60))
        >>> matrix = signal + 0.1 * rng.standard_normal((40, 60))
        >>> evbmf_rank(np.linalg.svd(matrix, compute_uv=False), 60)
        3
    """
    if not values[0]:
        return 0
    # A matrix of exactly low rank has no noise at all, for which the free energy has no minimum.
    energy = np.maximum((values / values[0]) ** 2, np.finfo(np.float64).eps ** 2)
    ratio = len(values) / columns
    t = 2.5129 * np.sqrt(ratio)
    bound = (1 + t) * (1 + ratio / t)
    return int((energy > columns * _noise(energy, columns, ratio, bound) * bound).sum())


def _noise(energy: np.ndarray, columns: int, ratio: float, bound: float) -> float:
    """The variance of smallest free energy, on a grid of logarithms that narrows to the best."""
    start = min(max(int(np.ceil(len(energy) / (1 + ratio))) - 1, 0), len(energy) - 1)
    least = max(energy[start] / (columns * bound), energy[start:].mean() / columns)
    low, high = np.log(least), np.log(max(energy.mean() / columns, least))
    for _ in range(4):
        grid = np.linspace(low, high, 101)
        free = [_free_energy(energy / (columns * np.exp(v)), ratio, bound) for v in grid]
        best = int(np.argmin(free))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 100)]
    return float(np.exp(grid[best]))


def _free_energy(x: np.ndarray, ratio: float, bound: float) -> float:
    """The free energy over M / 2, up to a constant, at x = squared singular values / (M v)."""
    small, large = x[x <= bound], x[x > bound]
    rest = large - (1 + ratio)
    tau = (rest + np.sqrt(rest**2 - 4 * ratio)) / 2
    kept = large - tau + np.log((tau + 1) / large) + ratio * np.log(tau / ratio + 1)
    return float((small - np.log(small)).sum() + kept.sum())
