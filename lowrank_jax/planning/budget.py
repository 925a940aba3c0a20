"""What a network may cost, and the search for the smallest loss within it."""

import dataclasses
import math
import numbers
from collections.abc import Sequence

import numpy as np

MEASURES = ("parameters", "macs", "bytes", "latency")


@dataclasses.dataclass(frozen=True)
class Budget:
    """A limit on the cost of a whole network.

    Attributes:
        measure: "parameters", "macs", "bytes" (moved by the convolutions and products, each
            array once) or "latency" (in seconds, of the layers whose time was measured).
        amount: a float above 0 and up to 1 is a share of the dense network's cost; an int is
            absolute.

    Raises:
        ValueError: the measure or the amount is not one of these.

    Example:
        >>> Budget("macs", 0.5).limit(1000)
        500
        >>> print(Budget("parameters", 300_000))
        at most 300,000 parameters
    """

    measure: str
    amount: int | float

    def __post_init__(self) -> None:
        check_measure(self.measure)
        whole = isinstance(self.amount, numbers.Integral) and not isinstance(self.amount, bool)
        share = isinstance(self.amount, numbers.Real) and not isinstance(
            self.amount, numbers.Integral
        )
        if not (whole and self.amount >= 1 and self.measure != "latency") and not (
            share and 0 < self.amount <= 1
        ):
            absolute = (
                ""
                if self.measure == "latency"
                else ", or an int of 1 or more for an absolute limit"
            )
            raise ValueError(
                f"Budget of {self.measure}: {self.amount!r} is not allowed; give a float above 0 and up to 1 for a "
                f"share of the dense network{absolute}."
            )
        object.__setattr__(self, "amount", int(self.amount) if whole else float(self.amount))

    def limit(self, dense: float) -> float:
        """The largest cost that is allowed to a network that costs this much dense."""
        if isinstance(self.amount, int):
            return self.amount
        limit = (
            self.amount * dense * (1 + 1e-12)
        )  # a share of 0.29 of 100 is 29, and sums of times differ in order
        return limit if self.measure == "latency" else math.floor(limit)

    def __str__(self) -> str:
        amount = (
            f"{self.amount:,}"
            if isinstance(self.amount, int)
            else f"{self.amount:.4g} of the dense"
        )
        return f"at most {amount} {self.measure.replace('_', '-')}"


def number(cost: float) -> str:
    """A cost as text: counts in full, seconds to three digits.

    Example:
        >>> number(1234567), number(0.0123456)
        ('1,234,567', '0.0123')
    """
    return f"{cost:,}" if isinstance(cost, int) else f"{cost:.3g}"


def check_measure(measure: str) -> str:
    """Returns the measure, or raises ValueError that lists those there are."""
    if measure not in MEASURES:
        raise ValueError(
            f"The measure {measure!r} is not known; give one of {', '.join(map(repr, MEASURES))}."
        )
    return measure


def check_budget(budget: Budget) -> Budget:
    """Returns the budget, or raises ValueError if it is something else."""
    if not isinstance(budget, Budget):
        raise ValueError(
            f"The budget {budget!r} is not allowed; give one such as Budget('macs', 0.5)."
        )
    return budget


def solve(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], limit: float) -> list[int]:
    """Chooses one option of every layer so that the sum of losses is small and the costs stay
    within a limit.

    For a multiplier m each layer on its own takes the option of least loss + m * cost, which lies
    on the lower convex hull of its options (Everett, 1963; Shoham and Gersho, 1988). The
    multipliers at which a choice changes are the slopes of the hulls, so the search bisects the
    sorted slopes. The cost left then goes to the options that still fit, largest gain first. The
    sum exceeds the smallest possible one by less than what the first step along a hull that did not
    fit gains. What a spectrum leaves out is convex in the rank, so that this is one rank step of
    one layer, or the step from a rank to dense or to the other order of the factors.

    Args:
        costs, losses: for each layer one entry an option, in any order.
        limit: at least the sum of the cheapest options.

    Returns:
        For each layer the index of the option.

    Raises:
        ValueError: the cheapest options together exceed the limit.

    Example:
        >>> solve([np.array([1, 2, 4]), np.array([1, 3])], [np.array([9, 4, 0]), np.array([8, 1])], limit=5)
        [1, 1]
    """
    hulls = [lower_hull(cost, loss) for cost, loss in zip(costs, losses, strict=True)]
    picks = [hull[0] for hull in hulls]
    spent = math.fsum(cost[pick] for cost, pick in zip(costs, picks, strict=True))
    if spent > limit:
        raise ValueError(
            f"No choice costs {limit:,.6g} or less; the least possible is {spent:,.6g}."
        )
    steps = [(layer, index) for layer, hull in enumerate(hulls) for index in hull[1:]]
    extra = np.concatenate([np.diff(cost[hull]) for cost, hull in zip(costs, hulls, strict=True)])
    slopes = np.concatenate(
        [
            _slopes(cost[hull], loss[hull])
            for cost, loss, hull in zip(costs, losses, hulls, strict=True)
        ]
    )
    order = np.argsort(-slopes, kind="stable")
    total = spent + np.cumsum(extra[order], dtype=np.float64)
    for step in order[: np.searchsorted(total, limit, side="right")]:
        layer, picks[layer] = steps[step]
    return _fill(costs, losses, picks, limit)


def lower_hull(costs: np.ndarray, losses: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of the options, from the cheapest to that of least loss.

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


def _slopes(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    # Rounding must not put a later step of a layer before an earlier one.
    return np.minimum.accumulate(-np.diff(losses) / np.diff(costs))


def _fill(
    costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], picks: list[int], limit: float
) -> list[int]:
    """Takes, as long as any fits, the one change of a layer that lowers the loss most."""
    while True:
        slack = limit - math.fsum(cost[pick] for cost, pick in zip(costs, picks, strict=True))
        reach = [cost <= cost[pick] + slack for cost, pick in zip(costs, picks, strict=True)]
        best = [
            int(np.argmin(np.where(fits, loss, np.inf)))
            for fits, loss in zip(reach, losses, strict=True)
        ]
        gains = [
            loss[pick] - loss[new] for loss, pick, new in zip(losses, picks, best, strict=True)
        ]
        layer = int(np.argmax(gains)) if gains else 0
        if not gains or gains[layer] <= 0:
            return picks
        picks[layer] = best[layer]
