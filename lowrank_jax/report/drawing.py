"""How pictures look: one style, drawn on white paper, for bright and for dark screens."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowrank_jax.report.record import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.2  # inches; on a phone a picture is about as wide, so that its text stays readable
NO_PICTURES = (
    "There are no pictures, because matplotlib is not installed. Install it by "
    "pip install 'lowrank-jax[demo]' and run the command again."
)
AFTER, BEFORE = "C0", "C1"  # of the low-rank network and of the dense one
PNG = dict(format="png", dpi=160, facecolor="white")
SVG = dict(format="svg", transparent=True, metadata={"Date": None})
STYLE = {
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 9,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.hashsalt": "lowrank_jax",  # the same picture has the same bytes
    "text.parse_math": False,  # layers may have any name
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Palette:
    """Colours of a kind of screen.

    Attributes:
        ink: of text and lines.
        faint: of grids.
        surface: of the page, thus of zero in a picture of weights.
        after, before: of the low-rank and of the dense network.
    """

    ink: str
    faint: str
    surface: str
    after: str
    before: str

    def style(self) -> dict[str, Any]:
        """The settings of matplotlib."""
        from cycler import cycler

        ink = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
        colours = cycler(color=[self.after, self.before])
        own = {"axes.prop_cycle": colours, "grid.color": self.faint, "axes.facecolor": self.surface}
        return {**STYLE, **dict.fromkeys(ink, self.ink), **own}


BRIGHT = Palette(
    ink="#3a4149", faint="#e3e5e8", surface="#ffffff", after="#1668b8", before="#b4bac2"
)
DARK = Palette(ink="#c3c9d1", faint="#343a42", surface="#1b1f24", after="#6db3f2", before="#616a75")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture as bytes of files.

    Attributes:
        png: on white, for the Markdown.
        bright, dark: SVG without a background, for the page.
    """

    png: bytes
    bright: bytes
    dark: bytes


def draw_all(pictures: list[Picture]) -> dict[str, Drawn]:
    """Name of every picture to its files; none where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}
    return {picture.name: _drawn(picture) for picture in pictures}


def _drawn(picture: Picture) -> Drawn:
    png, bright = _files(picture, BRIGHT, [PNG, SVG])
    [dark] = _files(picture, DARK, [SVG])
    return Drawn(png=png, bright=bright, dark=dark)


def _files(picture: Picture, palette: Palette, formats: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """A picture in some colours, in each of some formats."""
    import matplotlib

    found, style = [], palette.style()
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = picture.draw()
        for options in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, **options)
            figure.set_layout_engine("none")  # it stays as it was laid out, which takes long
            found.append(buffer.getvalue())
    return found


def new_figure(height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure of the usual width and its axes, row by row.

    Args:
        height: inches.
        rows, columns: of the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def grouped_bars(axis: "Axes", names: Sequence[str], bars: Mapping[str, tuple]) -> None:
    """Bars for each name, under each other in the order of the names.

    Args:
        axis: on which they are drawn.
        names: of the groups, such as layers.
        bars: label to the colour and the values, one for each name.
    """
    places, step = range(len(names)), 0.8 / len(bars)
    for index, (label, (colour, values)) in enumerate(bars.items()):
        shift = step * (index - (len(bars) - 1) / 2)
        own = [place + shift for place in places]
        axis.barh(own, values, height=0.95 * step, color=colour, label=label)
    axis.set_yticks(places, [short(name) for name in names])
    axis.invert_yaxis()
    axis.locator_params(axis="x", nbins=4)
    legend_below(axis, columns=len(bars))


def legend_below(axis: "Axes", columns: int) -> None:
    """A legend under the axis and its ticks, where it hides nothing."""
    axis.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        borderaxespad=2.2,
        ncols=columns,
        columnspacing=1.2,
        frameon=False,
    )


def short(name: str, most: int = 22) -> str:
    """The name of a layer, without its beginning if it is long.

    Example:
        >>> short("encoder/block_11/attention/query", most=16)
        '…attention/query'
    """
    return name if len(name) <= most else f"…{name[1 - most :]}"
