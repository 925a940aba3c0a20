"""The search for the smallest loss within a budget: one candidate of every layer."""

import math
from collections.abc import Sequence

import numpy as np


def solve(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], limit: float) -> list[int]:
    """Chooses one candidate of every layer: the sum of losses is small, the costs keep to a limit.

    For a multiplier m each layer on its own takes the candidate of least loss + m * cost, which
    lies on the lower convex hull of its candidates (Everett, 1963; Shoham and Gersho, 1988). The
    multipliers at which a choice changes are the slopes of the hulls. So the steps along all hulls
    are taken in the order of their slopes, as long as their costs fit. The cost left then goes to
    the candidates that still fit, largest gain first.

    The sum exceeds the smallest possible one by less than the gain of the first step that did not
    fit. What a spectrum leaves out is convex in the rank, so that this is one rank of one layer, or
    the step from a rank to dense or to the other order of the factors.

    Args:
        costs, losses: for each layer one entry per candidate, in any order.
        limit: at least the sum of the cheapest candidates.

    Returns:
        For each layer the index of the candidate.

    Raises:
        ValueError: the cheapest candidates together exceed the limit.

    Example:
        >>> costs = [np.array([1, 2, 4]), np.array([1, 3])]
        >>> losses = [np.array([9, 4, 0]), np.array([8, 1])]
        >>> solve(costs, losses, limit=5)
        [1, 1]
    """
    hulls = [lower_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    picks = [hull[0] for hull in hulls]
    spent = _spent(costs, picks)
    if spent > limit:
        raise ValueError(
            f"No choice costs {limit:,.6g} or less; the least possible is {spent:,.6g}. Raise it."
        )
    steps, extra, slopes = _steps(costs, losses, hulls)
    order = np.argsort(-slopes, kind="stable")
    total = spent + np.cumsum(extra[order], dtype=np.float64)
    for step in order[: np.searchsorted(total, limit, side="right")]:
        layer, picks[layer] = steps[step]
    return _fill(costs, losses, picks, limit)


def lower_hull(costs: np.ndarray, losses: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of the candidates, from the cheapest to that of least loss.

    Example:
        >>> lower_hull(np.array([1, 2, 3, 4]), np.array([9, 8, 2, 2]))
        [0, 2]
    """
    hull: list[int] = []
    x, y = costs.tolist(), losses.tolist()
    for i in np.lexsort((losses, costs)).tolist():
        if hull and y[i] >= y[hull[-1]]:
            continue
        while len(hull) > 1 and _above(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(x: list, y: list, a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (y[a] - y[b]) * (x[c] - x[b]) <= (y[b] - y[c]) * (x[b] - x[a])


def _spent(costs: Sequence[np.ndarray], picks: Sequence[int]) -> float:
    return math.fsum(cost[pick] for cost, pick in zip(costs, picks, strict=True))


def _steps(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], hulls: Sequence[list[int]]
) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """All steps along the hulls: (layer, index) that a step leads to, its cost and its slope."""
    steps = [(layer, index) for layer, hull in enumerate(hulls) for index in hull[1:]]
    extra, slopes = [np.empty(0)], [np.empty(0)]
    for cost, loss, hull in zip(costs, losses, hulls, strict=True):
        extra.append(np.diff(cost[hull]))
        slope = -np.diff(loss[hull]) / extra[-1]
        slopes.append(np.minimum.accumulate(slope))  # rounding must not change a layer's order
    return steps, np.concatenate(extra), np.concatenate(slopes)


def _fill(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], picks: list[int], limit: float
) -> list[int]:
    """Takes, as long as any fits, the one change of a layer that lowers the loss most."""
    while picks:
        slack = limit - _spent(costs, picks)
        best = [
            int(np.argmin(np.where(cost <= cost[pick] + slack, loss, np.inf)))
            for cost, loss, pick in zip(costs, losses, picks, strict=True)
        ]
        gains = [
            loss[pick] - loss[new] for loss, pick, new in zip(losses, picks, best, strict=True)
        ]
        layer = int(np.argmax(gains))
        if not gains[layer] > 0:  # NaN ends the search, too
            break
        picks[layer] = best[layer]
    return picks
