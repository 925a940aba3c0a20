"""How much of what some inputs tell is no noise."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

EVEN = np.ones(2)


def signal_share(one: np.ndarray, two: np.ndarray, counts: np.ndarray = EVEN) -> float:
    """The share of the mean of two estimates that is to be kept (James and Stein).

    Two sets of inputs differ by noise alone. The share is 1 where both tell the same, and 0 where
    they differ by as much as noise would.

    Args:
        one, two: the estimates.
        counts: inputs of each set.

    Example:
        >>> one, two = np.array([1.0, 1.0]), np.array([1.0, -1.0])
        >>> signal_share(one, one), signal_share(one, two), signal_share(one, -one)
        (1.0, 0.0, 0.0)
    """
    first, second = counts / counts.sum()
    noise = first * second * np.sum((one - two) ** 2)
    size = np.sum((first * one + second * two) ** 2)
    return float(max(0.0, 1 - noise / size)) if size else 0.0


def independent(whole: Mapping[str, np.ndarray], even: Mapping[str, np.ndarray]) -> float:
    """How many independent samples would tell as much of a covariance as some patches do.

    The covariance S of n Gaussian samples has a noise of (S_ij^2 + S_ii S_jj) / n. Two sets of
    inputs tell how large the noise is. Neighbours in an image are alike, so that n is less than the
    number of patches.

    Args:
        whole: "count", "y", "yy" and "part" of all inputs, as `strip_sums` gives them.
        even: the first three of one of two sets of the inputs.

    Returns:
        A number from 1, where there is one set alone, to the number of patches.
    """
    count, one = float(whole["count"]), float(even["count"])
    if not 0 < one < count:
        return 1.0
    odd = {name: whole[name] - even[name] for name in even}
    differences = _of_first(even) - _of_first(odd)
    noise = one * (count - one) / count**2 * np.sum(differences**2)
    yy = whole["yy"] if whole["yy"].ndim == 2 else np.diagonal(whole["yy"], axis1=1, axis2=2)
    variance = yy / count - (whole["y"] / count) ** 2
    covariance = _of_first(whole)
    first = variance[:, : covariance.shape[1]]
    expected = np.sum(covariance**2) + np.sum(first.sum(1) * variance.sum(1))
    return float(np.clip(expected / noise, 1, count)) if noise else count


def _of_first(sums: Mapping[str, np.ndarray]) -> Float[np.ndarray, "g k m"]:
    """The covariance of the first outputs with all."""
    mean = sums["y"] / sums["count"]
    first = mean[:, : sums["part"].shape[1]]
    return sums["part"] / sums["count"] - first[:, :, None] * mean[:, None, :]
