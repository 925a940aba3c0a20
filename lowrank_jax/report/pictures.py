"""The pictures of the journey: accuracies of its networks, and costs of its layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_jax.experiments.journey import CLOSED, FITTED, TUNED, Journey
from lowrank_jax.experiments.journey import DENSE as START
from lowrank_jax.report.drawing import grouped_bars, legend_below, new_figure
from lowrank_jax.report.tables import count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE, LIGHT, LOWRANK = "#8c8c8c", "#9ecae1", "#1f77b4"


def draw_costs(journey: Journey, measures: Sequence[str] = ("parameters", "macs")) -> "Figure":
    """Costs of each layer, dense, at the given ranks and at the planned ones.

    Args:
        journey: what was found.
        measures: "parameters" or "macs", a picture for each, one above the other.
    """
    names = [choice.path for choice in journey.given]
    figure, axes = new_figure((0.9 + 0.4 * len(names)) * len(measures), rows=len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        lines = {
            "dense": (DENSE, [getattr(choice, measure)[0] for choice in journey.given]),
            "given": (LIGHT, [getattr(choice, measure)[1] for choice in journey.given]),
            "planned": (LOWRANK, [getattr(choice, measure)[1] for choice in journey.planned]),
        }
        grouped_bars(axis, names, lines)
        axis.set_title("Multiply-adds" if measure == "macs" else "Weights", loc="left")
        axis.xaxis.set_major_formatter(lambda value, _: count(value) if value else "0")
    return figure


def draw_accuracy(journey: Journey) -> "Figure":
    """The accuracy of every stage, beside that of the dense network."""
    figure, [axis] = new_figure(0.9 + 0.35 * len(journey.stages))
    low = {name: stage for name, stage in journey.stages.items() if stage.plan}
    scores = [100 * stage.accuracy for stage in low.values()]
    colors = [LIGHT if name in (CLOSED, FITTED, TUNED) else LOWRANK for name in low]
    axis.barh(range(len(low)), scores, color=colors)
    axis.axvline(100 * journey.stages[START].accuracy, color=DENSE, ls="--", label="dense")
    labels = [f"{name}: {score:.1f}" for name, score in zip(low, scores, strict=True)]
    axis.set_yticks(range(len(low)), labels)
    axis.invert_yaxis()
    axis.set(title="Test accuracy, %", xlim=(0, 100))
    legend_below(axis, columns=1)
    return figure
