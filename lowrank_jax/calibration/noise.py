"""How much of what some inputs tell is no noise."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from lowrank_jax.factorization.strips import Strips

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
    size = np.sum((first * one + second * two) ** 2)
    return max(0.0, 1 - noise_of(one, two, counts) / float(size)) if size else 0.0


def noise_of(one: np.ndarray, two: np.ndarray, counts: np.ndarray) -> float:
    """The squared noise of the mean of two estimates, from so many inputs each.

    Example:
        >>> noise_of(np.array([1.0, 1.0]), np.array([1.0, -1.0]), EVEN)
        1.0
    """
    first, second = counts / counts.sum()
    return float(first * second * np.sum((one - two) ** 2))


def independent(own: Strips, part: np.ndarray, even: Mapping[str, np.ndarray]) -> float:
    """How many independent samples would tell as much of a covariance as some patches do.

    The covariance S of n Gaussian samples has a noise of (S_ij^2 + S_ii S_jj) / n. Two sets of
    inputs tell how large the noise is. Neighbours in an image are alike, so that n is less than the
    number of patches.

    Args:
        own: the sums of all inputs.
        part: sums of the products of the first outputs with all, as `strip_sums` gives them.
        even: "count", "y" and "part" of one of two sets of the inputs.

    Returns:
        A number from 1, where there is one set alone, to the number of patches.
    """
    whole: dict[str, Any] = {"count": own.count, "y": own.y, "part": part}
    one, two = even["count"], own.count - even["count"]
    if not (one and two):
        return 1.0
    odd = {name: whole[name] - even[name] for name in even}
    noise = noise_of(_of_first(even), _of_first(odd), np.array([one, two]))
    covariance, variance = _of_first(whole), own.variance
    first = variance[:, : covariance.shape[1]]
    expected = np.sum(covariance**2) + np.sum(first.sum(1) * variance.sum(1))
    return float(np.clip(expected / noise, 1, own.count)) if noise else float(own.count)


def _of_first(sums: Mapping[str, np.ndarray]) -> Float[np.ndarray, "g k m"]:
    """The covariance of the first outputs with all."""
    mean = sums["y"] / sums["count"]
    first = mean[:, : sums["part"].shape[1]]
    return sums["part"] / sums["count"] - first[:, :, None] * mean[:, None, :]
