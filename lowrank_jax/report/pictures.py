"""The pictures of an experiment."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowrank_jax.experiments.journey import CLOSED, FITTED, TUNED, Journey
from lowrank_jax.experiments.journey import DENSE as START

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE, LIGHT, LOWRANK = "#8c8c8c", "#9ecae1", "#1f77b4"


def _figure(columns: int) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_spectra(journey: Journey) -> "Figure":
    """The singular values of each decomposed layer, with its rank."""
    figure, axes = _figure(len(journey.spectra))
    schemes = journey.given.ranks
    for axis, (name, values) in zip(axes, journey.spectra.items(), strict=True):
        rank = schemes[name].rank
        kept = (values[:rank] ** 2).sum() / (values**2).sum()
        axis.semilogy(range(1, len(values) + 1), values, ".-", color=DENSE)
        axis.semilogy(range(1, rank + 1), values[:rank], ".-", color=LOWRANK)
        axis.axvline(rank + 0.5, color="black", lw=1, ls="--")
        axis.set(
            title=f"{name}: rank {rank} keeps {kept:.1%} of the energy",
            xlabel="index",
            ylabel="singular value",
        )
        axis.title.set_size(10)
    return figure


def draw_costs(journey: Journey) -> "Figure":
    """Parameters and macs of each layer, dense, at the given ranks and at the planned ones."""
    figure, axes = _figure(2)
    names = [choice.path for choice in journey.given]
    for axis, measure in zip(axes, ("parameters", "macs"), strict=True):
        lines = {
            "dense": (DENSE, [getattr(choice, measure)[0] for choice in journey.given]),
            "given ranks": (LIGHT, [getattr(choice, measure)[1] for choice in journey.given]),
            "planned ranks": (LOWRANK, [getattr(choice, measure)[1] for choice in journey.planned]),
        }
        for index, (label, (color, values)) in enumerate(lines.items()):
            places = [place + 0.27 * (index - 1) for place in range(len(names))]
            axis.bar(places, values, 0.27, color=color, label=label)
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set_title("macs per image" if measure == "macs" else measure, size=10)
        axis.legend(frameon=False)
    return figure


def draw_accuracy(journey: Journey) -> "Figure":
    """The accuracy of every stage, beside that of the dense network."""
    figure, (axis,) = _figure(1)
    low = {name: stage for name, stage in journey.stages.items() if stage.plan}
    scores = [100 * stage.accuracy for stage in low.values()]
    colors = [LIGHT if name in (CLOSED, FITTED, TUNED) else LOWRANK for name in low]
    bars = axis.barh(range(len(low)), scores, color=colors)
    axis.bar_label(bars, fmt="%.1f", padding=2)
    axis.axvline(100 * journey.stages[START].accuracy, color=DENSE, ls="--", label="dense")
    axis.set_yticks(range(len(low)), list(low))
    axis.invert_yaxis()
    axis.set(xlabel="test accuracy, %", xlim=(0, 110))
    axis.legend(frameon=False)
    return figure


PICTURES: dict[str, Callable[[Journey], "Figure"]] = {
    "spectra": draw_spectra,
    "costs": draw_costs,
    "accuracy": draw_accuracy,
}
