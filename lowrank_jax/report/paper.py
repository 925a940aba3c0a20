"""What the ranks of a published network cost and gain, as a table beside the authors' figures."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from lowrank_jax.models.published import Published
from lowrank_jax.program.kernel_use import KernelUse
from lowrank_jax.report.costs import LayerCost, layers_section, total
from lowrank_jax.report.record import Report, Section, Table
from lowrank_jax.report.tables import as_costs, markdown_table
from lowrank_jax.tree.rules import resolve
from lowrank_jax.tuning.device import machine

HEAD = ("layer", "rank", "parameters", "low-rank", "factor", "macs", "low-rank", "factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A convolution for one image, dense and with its factors.

    Attributes:
        layer: its path.
        rank: of the factors, the sum over its groups; None where it stays dense.
        parameters, macs: of the kernel and of what stands for it.
        error: Frobenius norm of what the factors lack, over that of the kernel; None where the
            weights are random.
    """

    layer: str
    rank: int | None
    parameters: tuple[int, int]
    macs: tuple[int, int]
    error: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """What was found of a network.

    Attributes:
        layers: its convolutions.
        batch: images in a forward pass.
        speed_up: quartiles of the time of the dense network over that of the low-rank one.
        compression, published_speed_up: the authors' figures; None if there are none.
        notes: whose ranks and which weights they are.
    """

    layers: Sequence[LayerFacts]
    batch: int
    speed_up: tuple[float, float, float]
    compression: float | None = None
    published_speed_up: float | None = None
    notes: Sequence[str] = ()


def layer_facts(
    network: Published, errors: Mapping[str, float] | None = None
) -> tuple[LayerFacts, ...]:
    """The convolutions of a network at its ranks. No weights are made.

    Args:
        network: of `lowrank_jax.models.published.PUBLISHED`.
        errors: path to the error of the layer, where it is known.

    Example:
        >>> from lowrank_jax.models.published import PUBLISHED
        >>> first, *_ = layer_facts(PUBLISHED["CIFAR CNN"])
        >>> first.rank, first.parameters  # 25 * 3 * 96 and 10 * 5 * (3 + 96)
        (10, (7200, 4950))
    """
    program = network.trace()
    schemes, errors = resolve(network.ranks, program), errors or {}

    def facts(use: KernelUse) -> LayerFacts:
        scheme = schemes.get(use.path)
        rank = None if scheme is None else scheme.rank * scheme.groups
        parameters = use.parameters if scheme is None else use.parameters_at(scheme)
        macs = use.macs if scheme is None else use.macs_at(scheme)
        return LayerFacts(
            layer=use.path,
            rank=rank,
            parameters=(use.parameters, parameters),
            macs=(use.macs, macs),
            error=errors.get(use.path),
        )

    return tuple(facts(use) for use in program if use.kind != "product")


def factor(layers: Sequence[LayerFacts], measure: str) -> float:
    """How many times the parameters or the macs of some layers fall.

    Example:
        >>> layer = LayerFacts(layer="a", rank=2, parameters=(90, 30), macs=(900, 450))
        >>> factor([layer], "parameters"), factor([layer], "macs")
        (3.0, 2.0)
    """
    dense, low = total(layers, measure)
    return dense / low


def markdown(found: NetworkFacts) -> str:
    """The costs as a table, and the factors beside the published ones."""
    return "\n".join([layer_table(found.layers), "", *_sentences(found), *found.notes])


def _sentences(found: NetworkFacts) -> list[str]:
    """The factors beside the published ones."""
    layers = found.layers
    decomposed = [layer for layer in layers if layer.rank is not None]
    low, median, high = found.speed_up
    return [
        f"Weights: {factor(layers, 'parameters'):.3f} times fewer, in the decomposed layers "
        f"{factor(decomposed, 'parameters'):.3f} times" + _beside(found.compression) + ".",
        f"Multiply-adds: {factor(layers, 'macs'):.2f} times fewer.",
        f"Forward pass of {found.batch} images: {median:.2f} times as fast "
        f"(quartiles {low:.2f} to {high:.2f})" + _beside(found.published_speed_up) + ".",
    ]


def layer_table(layers: Sequence[LayerFacts]) -> str:
    """A row for each convolution and one for all; with a column of errors where one is known."""
    known = any(layer.error is not None for layer in layers)
    rows = [(*HEAD, "error") if known else HEAD]
    for layer in layers:
        rank = "dense" if layer.rank is None else str(layer.rank)
        cells = (layer.layer, rank, *as_costs(layer.parameters), *as_costs(layer.macs))
        error = "" if layer.error is None else f"{layer.error:.3f}"
        rows.append((*cells, error) if known else cells)
    sums = (*as_costs(total(layers, "parameters")), *as_costs(total(layers, "macs")))
    rows.append(("convolutions", "", *sums, "") if known else ("convolutions", "", *sums))
    return markdown_table(Table(rows=rows))


def _beside(published: float | None) -> str:
    return "" if published is None else f"; published: {published:.2f}"


def paper_report(found: Mapping[str, NetworkFacts]) -> Report:
    """The report of `paper`: a section for each network, and all of them beside the published.

    Args:
        found: name of a network to what was found.
    """
    names = ", ".join(found)
    return Report(
        title="lowrank-jax paper",
        summary="What the ranks of Tai et al. (2016) save and gain on this device, beside what "
        f"was published: {names}.",
        machine=machine(),
        sections=[_overview(found), *(_section(name, own) for name, own in found.items())],
        facts={"networks": {name: dataclasses.asdict(own) for name, own in found.items()}},
    )


def _overview(found: Mapping[str, NetworkFacts]) -> Section:
    head = ("network", "weights fewer", "published", "macs fewer", "speed", "published")
    rows = [head, *(_overview_row(name, own) for name, own in found.items())]
    text = (
        "Each figure is a factor: how many times fewer weights and multiply-adds the convolutions "
        "have, and how many times as fast the whole network runs here. The authors' speeds are of "
        "other devices. Fewer multiply-adds are not yet less time; lowrank_jax.fast finds the "
        "fastest algorithm of each layer."
    )
    return Section(title="All networks", text=text, table=Table(rows=rows))


def _overview_row(name: str, found: NetworkFacts) -> tuple[str, ...]:
    counts = (f"{factor(found.layers, m):.2f}" for m in ("parameters", "macs"))
    weights, macs = counts
    published = (_known(found.compression), _known(found.published_speed_up))
    return name, weights, published[0], macs, f"{found.speed_up[1]:.2f}", published[1]


def _known(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def _section(name: str, found: NetworkFacts) -> Section:
    layers = [_cost(layer) for layer in found.layers]
    own = layers_section(layers, " ".join([*_sentences(found), *found.notes]))
    stem = re.sub(r"\W+", "_", name.lower())
    pictures = [dataclasses.replace(x, name=f"{stem}_{x.name}") for x in own.pictures]
    return dataclasses.replace(own, title=name, pictures=pictures)


def _cost(layer: LayerFacts) -> LayerCost:
    return LayerCost(
        path=layer.layer,
        form="" if layer.rank is None else "vertical",
        rank="dense" if layer.rank is None else str(layer.rank),
        parameters=layer.parameters,
        macs=layer.macs,
        error=layer.error,
    )
