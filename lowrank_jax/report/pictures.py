"""The pictures of an experiment."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowrank_jax.experiments.cifar10 import Journey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DENSE, LOWRANK = "#8c8c8c", "#1f77b4"


def _figure(columns: int) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_spectra(journey: Journey) -> "Figure":
    """The singular values of each decomposed layer, with its rank."""
    figure, axes = _figure(len(journey.spectra))
    ranks = {layer.name: layer.rank or 0 for layer in journey.layers}
    for axis, (name, values) in zip(axes, journey.spectra.items(), strict=True):
        rank = ranks[name]
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
    """Parameters and macs of each layer, dense and low-rank."""
    figure, axes = _figure(2)
    names = [layer.name for layer in journey.layers]
    for axis, field in zip(axes, ("parameters", "macs"), strict=True):
        for shift, which, color, label in (
            (-0.2, 0, DENSE, "dense"),
            (0.2, 1, LOWRANK, "low-rank"),
        ):
            values = [getattr(layer, field)[which] for layer in journey.layers]
            axis.bar([i + shift for i in range(len(names))], values, 0.4, color=color, label=label)
        axis.set_xticks(range(len(names)), names, rotation=30)
        axis.set_title("macs per image" if field == "macs" else field, size=10)
        axis.legend(frameon=False)
    return figure


def draw_accuracy(journey: Journey) -> "Figure":
    """Accuracy along the fine-tuning, from the decomposed network on."""
    figure, (axis,) = _figure(1)
    curve = [journey.accuracy["decomposed"], *journey.curve]
    axis.plot(
        range(len(curve)), [100 * value for value in curve], "o-", color=LOWRANK, label="low-rank"
    )
    axis.axhline(100 * journey.accuracy["dense"], color=DENSE, ls="--", label="dense")
    axis.set(xlabel="epochs of fine-tuning", ylabel="test accuracy, %", xticks=range(len(curve)))
    axis.legend(frameon=False)
    return figure


PICTURES: dict[str, Callable[[Journey], "Figure"]] = {
    "spectra": draw_spectra,
    "costs": draw_costs,
    "accuracy": draw_accuracy,
}
