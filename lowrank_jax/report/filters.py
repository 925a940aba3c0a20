"""The filters of one layer: as they were, the factors, and what the factors multiply to."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_jax.factorization.factors import is_factors, read_factors
from lowrank_jax.factorization.merging import product
from lowrank_jax.planning.plans import Choice, Plan
from lowrank_jax.report.drawing import new_figure
from lowrank_jax.report.record import Picture, Section
from lowrank_jax.tree.paths import named_leaves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 8  # filters in a row
LAYOUT = "HWIO"
ORDINALS = ("First", "Second", "Third")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Filters:
    """Some filters of one convolution.

    Attributes:
        path: of the layer.
        rows: what a row shows to its filters (number, h, w); those of factors are smaller.
    """

    path: str
    rows: Mapping[str, np.ndarray]


def filters_section(plan: Plan, dense: Any, small: Any) -> Section | None:
    """The filters of the convolution in which a plan saves most; None if there is none.

    Args:
        plan: which layers have factors.
        dense, small: trees of the dense and of the low-rank network.
    """
    choice = pictured(plan, dense)
    node = named_leaves(small)[choice.path] if choice else None
    if choice is None or not is_factors(node):
        return None
    found = filters(choice.path, named_leaves(dense)[choice.path], node)
    text = (
        f"{choice.path} is the convolution in which most multiply-adds are saved. Its filters are "
        "sums of products of the small ones; where the first two rows look alike, little was lost."
    )
    return Section(title="The filters themselves", text=text, pictures=[filters_picture(found)])


def pictured(plan: Plan, dense: Any) -> Choice | None:
    """The convolution of two dimensions in which a plan saves most."""
    leaves = named_leaves(dense)
    fitting = [choice for choice in plan if _is_pictured(choice, leaves.get(choice.path))]
    return min(fitting, key=lambda choice: choice.macs[1] - choice.macs[0], default=None)


def _is_pictured(choice: Choice, kernel: Any) -> bool:
    if choice.scheme is None or choice.changed or kernel is None or is_factors(kernel):
        return False
    axes = choice.scheme.axes
    return set(axes) == set(LAYOUT) and max(_usual(kernel, axes).shape[:2]) > 1


def filters(path: str, kernel: Any, node: Any) -> Filters:
    """The strongest filters of a kernel, and those of its factors.

    Args:
        path: of the layer.
        kernel: dense, of two spatial axes.
        node: its factors, as a tree has them.

    Example:
        >>> import jax, lowrank_jax as lr
        >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 16))
        >>> small = lr.decompose({"stem": kernel}, {"stem": 2})
        >>> found = filters("stem", kernel, small["stem"])
        >>> found.rows["As it was"].shape, found.rows["First factor, 3 x 1"].shape
        ((8, 3, 3), (2, 3, 1))
    """
    _, axes, _ = read_factors(node, path)
    dense, rebuilt = _usual(kernel, axes), _usual(product(node, path), axes)
    strongest = _strongest(dense)
    rows = {
        "As it was": _chosen(dense, strongest),
        "Rebuilt from its factors": _chosen(rebuilt, strongest),
    }
    for ordinal, factor in zip(ORDINALS, _factors(node, path), strict=False):
        own = _usual(factor, axes)
        h, w = own.shape[:2]
        rows[f"{ordinal} factor, {h} x {w}"] = _chosen(own, _strongest(own))
    return Filters(path=path, rows=rows)


def _factors(node: Mapping[str, Any], path: str) -> Iterator[Any]:
    """The arrays of a node in the order in which they run."""
    pair, _, _ = read_factors(node, path)
    for factor in pair:
        if is_factors(factor):
            yield from _factors(factor, path)
        else:
            yield factor


def _usual(kernel: Any, axes: str) -> np.ndarray:
    """The first kernel of a stack as (h, w, in, out)."""
    array = np.asarray(kernel, np.float32)
    own = array.reshape(-1, *array.shape[-len(axes) :])[0]
    return own.transpose([axes.index(letter) for letter in LAYOUT])


def _strongest(kernel: np.ndarray) -> list[tuple[int, int]]:
    """For the outputs of largest norm the (input, output) of their strongest filter."""
    norms = np.sqrt((kernel**2).sum((0, 1)))
    outputs = np.argsort(-norms.max(0), kind="stable")[:MOST]
    return [(int(norms[:, output].argmax()), int(output)) for output in outputs]


def _chosen(kernel: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.stack([kernel[:, :, i, o] for i, o in pairs])


def filters_picture(found: Filters) -> Picture:
    """The picture of some filters."""
    return Picture(
        name="filters",
        title=f"Filters of {found.path}",
        about="Each square is one filter; blue weights are positive, orange ones negative, and the "
        "colour of the page is zero. The first two rows show the same filters, those of largest "
        "weights; the rows of the factors show their own largest.",
        draw=lambda: _draw(found),
    )


def _draw(found: Filters) -> "Figure":
    rows = list(found.rows.items())
    h, w = rows[0][1].shape[1:]
    figure, axes = new_figure((0.35 + 0.5 * h / w) * len(rows), len(rows), 1)
    same = max(abs(own).max() for _, own in rows[:2])
    for index, (axis, (title, own)) in enumerate(zip(axes, rows, strict=True)):
        _draw_row(axis, own, (h, w), same if index < 2 else abs(own).max())
        axis.set_title(title, size=8, loc="left")
    return figure


def _draw_row(axis: "Axes", tiles: np.ndarray, size: tuple[int, int], most: float) -> None:
    """Tiles side by side, each in the middle of its place."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    (h, w), (own_h, own_w) = size, tiles.shape[1:]
    strip = np.full((h, MOST * (w + 1) - 1), np.nan)
    for index, tile in enumerate(tiles):
        top, left = (h - own_h) // 2, index * (w + 1) + (w - own_w) // 2
        strip[top : top + own_h, left : left + own_w] = tile
    zero, blue = matplotlib.rcParams["axes.facecolor"], "#1668b8"
    colours = LinearSegmentedColormap.from_list("weights", ["#d9731a", zero, blue])
    axis.imshow(strip, cmap=colours, vmin=-most or -1, vmax=most or 1, interpolation="nearest")
    axis.set_axis_off()
