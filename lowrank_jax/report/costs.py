"""What every layer costs before and after: the table, and bars of weights, macs and time."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lowrank_jax.planning.plans import Choice, Plan
from lowrank_jax.report.drawing import AFTER, BEFORE, grouped_bars, new_figure
from lowrank_jax.report.record import Json, Picture, Section, Table
from lowrank_jax.report.tables import Pair, count, seconds, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 20  # layers in a picture
NAMES = {"parameters": "weights", "macs": "multiply-adds", "seconds": "time"}
BARS = (
    "Grey is the layer as it was, blue what stands for it now. Where both bars are of one length, "
    "the layer stays as it was."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer for one image, dense and as it is in the low-rank network.

    Attributes:
        path: of the layer.
        form: of its factors, such as "vertical"; "" where it stays dense.
        rank: as text, such as "12"; "dense" where it stays dense.
        parameters, macs: (dense, low-rank).
        seconds: (dense, low-rank) of one call; None where it was not measured.
        error: predicted, the share of the squared outputs that is lost; None where it is not known.
    """

    path: str
    form: str = ""
    rank: str = "dense"
    parameters: Pair
    macs: Pair
    seconds: Pair | None = None
    error: float | None = None


def layer_costs(plan: Plan, times: Mapping[str, Pair] | None = None) -> list[LayerCost]:
    """The layers of a plan, and those that it leaves alone as one.

    Args:
        plan: of a network.
        times: layer path to its measured seconds, dense and low-rank.
    """
    found = [_layer_cost(choice, (times or {}).get(choice.path)) for choice in plan]
    rest = plan.rest
    if rest.parameters or rest.macs:
        parameters, macs = (rest.parameters,) * 2, (rest.macs,) * 2
        found.append(LayerCost(path="other layers", parameters=parameters, macs=macs))
    return found


def _layer_cost(choice: Choice, measured: Pair | None) -> LayerCost:
    scheme = choice.scheme
    return LayerCost(
        path=choice.path,
        form=scheme.name if scheme else "",
        rank="x".join(map(str, scheme.ranks)) if scheme else "dense",
        parameters=choice.parameters,
        macs=choice.macs,
        seconds=measured or choice.latency,
        error=choice.error,
    )


def layers_section(layers: Sequence[LayerCost], note: str = "") -> Section:
    """The table of all layers, and bars of those that cost most.

    Args:
        layers: at least one.
        note: what the reader should know of the figures, such as how they were measured.
    """
    measures = ["parameters", "macs"]
    if any(layer.seconds for layer in layers):
        measures.append("seconds")
    text = "Each row is a layer, for one image: as it was, as it is now, and what is left of it."
    return Section(
        title="What each layer costs",
        text=f"{text}\n\n{note}".strip(),
        table=layer_table(layers),
        pictures=[bars(layers, measure) for measure in measures],
    )


def layer_table(layers: Sequence[LayerCost]) -> Table:
    """A row for each layer and one for all; a column is there where a figure is known.

    Example:
        >>> costs = dict(parameters=(90, 30), macs=(9, 3))
        >>> layer = LayerCost(path="stem", form="vertical", rank="4", **costs)
        >>> for row in layer_table([layer]).rows:
        ...     print(*row, sep="|")
        layer|form|rank|weights|now|left|macs|now|left
        stem|vertical|4|90|30|33.3 %|9|3|33.3 %
        all|||90|30|33.3 %|9|3|33.3 %
    """
    timed = any(layer.seconds for layer in layers)
    known = any(layer.error is not None for layer in layers)
    head = ["layer", "form", "rank", "weights", "now", "left", "macs", "now", "left"]
    head += ["time", "now", "left"] * timed + ["error"] * known
    rows = [head, *(_row(layer, timed, known) for layer in layers)]
    sums = [*_counts(total(layers, "parameters")), *_counts(total(layers, "macs"))]
    times = total(layers, "seconds") if timed else None
    rows.append(["all", "", "", *sums, *_times(times) * timed, *[""] * known])
    return Table(rows=rows, left=2, sums=True)


def _row(layer: LayerCost, timed: bool, known: bool) -> list[str]:
    error = "" if layer.error is None else f"{layer.error:.4f}"
    costs = [*_counts(layer.parameters), *_counts(layer.macs)]
    times = _times(layer.seconds) * timed
    return [layer.path, layer.form, layer.rank, *costs, *times, *[error] * known]


def _counts(pair: Pair) -> list[str]:
    return [f"{pair[0]:,}", f"{pair[1]:,}", share(pair)]


def _times(pair: Pair | None) -> list[str]:
    return [seconds(pair[0]), seconds(pair[1]), share(pair)] if pair else [""] * 3


def total(layers: Sequence[object], measure: str) -> Pair:
    """A cost of all layers together, dense and low-rank; of the time, those that were measured."""
    pairs = [pair for layer in layers if (pair := getattr(layer, measure))]
    return sum(dense for dense, _ in pairs), sum(low for _, low in pairs)


def layer_facts(layers: Sequence[LayerCost]) -> list[Json]:
    """The layers as plain data."""
    return [dataclasses.asdict(layer) for layer in layers]


def bars(layers: Sequence[LayerCost], measure: str) -> Picture:
    """Bars of a cost of the layers, dense and low-rank.

    Args:
        layers: of which the `MOST` costliest are drawn.
        measure: "parameters", "macs" or "seconds".
    """
    known = [layer for layer in layers if getattr(layer, measure)]
    costliest = sorted(known, key=lambda layer: -getattr(layer, measure)[0])[:MOST]
    drawn = [layer for layer in known if layer in costliest]
    few = f" It shows the {MOST} layers that cost most of {len(known)}." * (len(known) > MOST)
    return Picture(
        name=NAMES[measure].replace("-", "_"),
        title=f"{NAMES[measure].capitalize()} of each layer",
        about=f"{BARS}{few}",
        draw=lambda: _draw_bars(drawn, measure),
    )


def _draw_bars(layers: Sequence[LayerCost], measure: str) -> "Figure":
    figure, [axis] = new_figure(0.9 + 0.3 * len(layers))
    before, after = zip(*(getattr(layer, measure) for layer in layers), strict=True)
    both = {"before": (BEFORE, before), "after": (AFTER, after)}
    grouped_bars(axis, [layer.path for layer in layers], both)
    axis.xaxis.set_major_formatter(lambda value, _: _tick(value, measure))
    axis.grid(axis="x")
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)
    return figure


def _tick(value: float, measure: str) -> str:
    if not value:
        return "0"
    return seconds(value) if measure == "seconds" else count(value)
