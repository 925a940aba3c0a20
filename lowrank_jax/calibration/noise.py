"""How much of what two sets of inputs tell is no noise."""

import numpy as np

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
