"""The picture of what each plan costs and how well its network does."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lowrank_jax.planning.plans import Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curve(
    points: Mapping[str, Sequence[tuple[Plan, float]]],
    measure: str = "macs",
    dense: float | None = None,
    axis: str = "accuracy, %",
) -> "Figure":
    """Draws accuracy over cost, one line for each label.

    Args:
        points: label of the line to its (plan, accuracy as a share) pairs, in any order.
        measure: "parameters", "macs", "bytes" or "latency".
        dense: accuracy of the dense network, drawn as a level.
        axis: what the accuracy is, for the axis.

    Returns:
        A matplotlib figure; ``figure.savefig("curve.png")`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no points.

    Example:
        >>> plan = Plan(choices=(), selector="fixed")
        >>> draw_curve({"fixed": [(plan, 0.9)]}).axes[0].get_xlabel()
        'macs, share of the dense network'
    """
    if not any(points.values()):
        raise ValueError("There are no points to draw; give at least one (plan, accuracy) pair.")
    figure = _figure()
    axes = figure.subplots()
    for label, line in points.items():
        pairs = sorted((_share(plan, measure), 100 * accuracy) for plan, accuracy in line)
        axes.plot(*zip(*pairs, strict=True), "o-", label=label)
    if dense is not None:
        axes.axhline(100 * dense, color="#8c8c8c", ls="--", label="dense")
    axes.set(xlabel=f"{measure}, share of the dense network", ylabel=axis)
    axes.legend(frameon=False)
    return figure


def _share(plan: Plan, measure: str) -> float:
    dense, chosen = plan.total(measure)
    return chosen / dense if dense else 1.0


def _figure() -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Drawing needs the extra 'demo': pip install 'lowrank-jax[demo]'."
        ) from error
    return Figure(figsize=(4.2, 3.2), layout="constrained")
