"""The singular values of the layers, with the rank at which they are cut."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.report.drawing import AFTER, BEFORE, new_figure, short
from lowrank_jax.report.record import Picture, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 6  # layers in the picture
FLOOR = 1e-4  # of the largest value; what is smaller counts for nothing and would stretch the axis


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Spectrum:
    """The singular values of a layer and where they are cut.

    Attributes:
        path: of the layer.
        rank: how many are kept.
        values: all of them, largest first, relative to the largest; the root mean square over the
            groups and the stack.
    """

    path: str
    rank: int
    values: np.ndarray


def spectra_section(plan: Plan, found: Spectra, weighted: bool) -> Section | None:
    """The spectra of the layers in which a plan saves most; None if it changes none.

    Args:
        plan: which ranks are kept.
        found: the singular values.
        weighted: whether they are of the outputs on data, not of the kernel alone.
    """
    cuts = spectra_cuts(plan, found)
    if not cuts:
        return None
    meaning = (
        "A singular value says how much of the layer's outputs one pair of filters carries, on the "
        "images given."
        if weighted
        else "A singular value says how much of the layer's kernel one pair of filters carries."
    )
    text = f"{meaning} The rank keeps the largest; the steeper they fall, the less is lost."
    return Section(title="Where the ranks cut", text=text, pictures=[spectra_picture(cuts)])


def spectra_cuts(plan: Plan, found: Spectra) -> list[Spectrum]:
    """The spectra of the layers in which a plan saves most, in the plan's order."""
    low = [c for c in plan if c.scheme and c.scheme.first in found.values.get(c.path, {})]
    saving = sorted(low, key=lambda choice: choice.macs[1] - choice.macs[0])[:MOST]
    return [
        _spectrum(choice.path, choice.scheme.rank, found.values[choice.path][choice.scheme.first])
        for choice in low
        if choice in saving and choice.scheme
    ]


def _spectrum(path: str, rank: int, values: np.ndarray) -> Spectrum:
    mean = np.sqrt(np.mean(values**2, axis=0))
    return Spectrum(path=path, rank=rank, values=mean / max(mean[0], np.finfo(float).tiny))


def spectra_picture(cuts: Sequence[Spectrum]) -> Picture:
    """The picture of some spectra."""
    return Picture(
        name="spectra",
        title="Singular values of the layers that save most",
        about="Each dot is one singular value, relative to the largest, on a logarithmic scale. "
        "Blue dots, left of the dashed line, are kept; grey ones are dropped.",
        draw=lambda: _draw(cuts),
    )


def _draw(cuts: Sequence[Spectrum]) -> "Figure":
    columns = min(len(cuts), 2)
    rows = -(-len(cuts) // columns)
    figure, axes = new_figure(0.5 + 1.6 * rows, rows, columns)
    for axis in axes[len(cuts) :]:
        axis.remove()
    for axis, cut in zip(axes, cuts, strict=False):
        _draw_cut(axis, cut)
    figure.supxlabel("number of the singular value", size=9)
    return figure


def _draw_cut(axis: "Axes", cut: Spectrum) -> None:
    numbers, values = np.arange(1, len(cut.values) + 1), np.maximum(cut.values, FLOOR)
    axis.semilogy(numbers[cut.rank :], values[cut.rank :], ".", color=BEFORE)
    axis.semilogy(numbers[: cut.rank], values[: cut.rank], ".", color=AFTER)
    axis.axvline(cut.rank + 0.5, color=BEFORE, lw=0.9, ls="--")
    axis.set_title(f"{short(cut.path)}\n{cut.rank} of {len(values)} kept", size=8)
    axis.set_ylim(FLOOR / 1.5, 1.6)
    axis.set_yticks([1, 1e-2, 1e-4], ["1", "0.01", "0.0001"], size=8)
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
