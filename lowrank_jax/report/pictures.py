"""The pictures of the journey: accuracies of its networks, and costs of its layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowrank_jax.experiments.journey import CLOSED, FITTED, TUNED, Journey
from lowrank_jax.experiments.journey import DENSE as START
from lowrank_jax.report.drawing import new_figure
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
    figure, axes = new_figure(2.9 * len(measures), rows=len(measures))
    names = [choice.path for choice in journey.given]
    for axis, measure in zip(axes, measures, strict=True):
        lines = {
            "dense": (DENSE, [getattr(choice, measure)[0] for choice in journey.given]),
            "given ranks": (LIGHT, [getattr(choice, measure)[1] for choice in journey.given]),
            "planned ranks": (LOWRANK, [getattr(choice, measure)[1] for choice in journey.planned]),
        }
        for index, (label, (color, values)) in enumerate(lines.items()):
            places = [place + 0.27 * (index - 1) for place in range(len(names))]
            axis.bar(places, values, 0.27, color=color, label=label)
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set_ylabel("multiply-adds" if measure == "macs" else "weights")
        axis.yaxis.set_major_formatter(lambda value, _: count(value) if value else "0")
        axis.legend()
    return figure


def draw_accuracy(journey: Journey) -> "Figure":
    """The accuracy of every stage, beside that of the dense network."""
    figure, [axis] = new_figure(0.9 + 0.35 * len(journey.stages))
    low = {name: stage for name, stage in journey.stages.items() if stage.plan}
    scores = [100 * stage.accuracy for stage in low.values()]
    colors = [LIGHT if name in (CLOSED, FITTED, TUNED) else LOWRANK for name in low]
    bars = axis.barh(range(len(low)), scores, color=colors)
    axis.bar_label(bars, fmt="%.1f", padding=2)
    axis.axvline(100 * journey.stages[START].accuracy, color=DENSE, ls="--", label="dense")
    axis.set_yticks(range(len(low)), list(low))
    axis.invert_yaxis()
    axis.set(xlabel="test accuracy, %", xlim=(0, 110))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=3.2)
    return figure
