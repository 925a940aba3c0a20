"""The reports of `plan` and `compress`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_jax.planning.curves import draw_curve
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.report.costs import layer_costs, layer_facts, layers_section
from lowrank_jax.report.filters import filters_section
from lowrank_jax.report.record import Highlight, Json, Picture, Report, Section, Table
from lowrank_jax.report.scores import Score
from lowrank_jax.report.spectra import spectra_section
from lowrank_jax.report.tables import count, percent, share
from lowrank_jax.report.times import Times
from lowrank_jax.tuning.device import machine


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Networks:
    """A network before and after, and what is known of both.

    Attributes:
        plan: of the ranks.
        dense, small: trees.
        spectra: singular values of the layers.
        weighted: whether they are of the outputs on data.
        times: that were measured; None if none were.
    """

    plan: Plan
    dense: Any
    small: Any
    spectra: Spectra
    weighted: bool
    times: Times | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Point:
    """A network on the curve of accuracy and cost.

    Attributes:
        amount: the share of the budget.
        plan: what was chosen.
        small: its tree.
        score: how well it does.
    """

    amount: float
    plan: Plan
    small: Any
    score: Score


def plan_report(
    subject: str, networks: Networks, points: Sequence[Point], following: Sequence[Section]
) -> Report:
    """The report of `plan`.

    Args:
        subject: the network, in words.
        networks: with the plain factors of the plan.
        points: of the curve; empty where none was asked for.
        following: what comes next, of `lowrank_jax.report.next_steps.after_plan`.
    """
    curve = [_curve_section(points)] if points else []
    return Report(
        title="lowrank-jax plan",
        subject=subject,
        summary=f"{asked(networks.plan)} {reached(networks.plan)}",
        machine=machine(),
        highlights=cost_highlights(networks),
        sections=[*_sections(networks), *curve, *following],
        facts={**_facts(networks), **_curve_facts(points)},
    )


def compress_report(
    subject: str,
    networks: Networks,
    score: Score,
    following: Sequence[Section],
    facts: Mapping[str, Json],
) -> Report:
    """The report of `compress`.

    Args:
        subject: the network, in words.
        networks: with the fitted factors.
        score: of the compressed network.
        following: what comes next, of `lowrank_jax.report.next_steps.after_compress`.
        facts: more of them, for the JSON.
    """
    plan = networks.plan
    return Report(
        title="lowrank-jax compress",
        subject=subject,
        summary=f"{asked(plan)} {reached(plan)} {score}",
        machine=machine(),
        highlights=[score.highlight(), *cost_highlights(networks)],
        sections=[*_sections(networks), *following],
        facts={**_facts(networks), **score.facts(), **facts},
    )


def asked(plan: Plan) -> str:
    """What was asked for, in a sentence."""
    if plan.budget is None:
        return f"The ranks are those of the selector {plan.selector}."
    return f"Asked for: {plan.budget}."


def reached(plan: Plan) -> str:
    """What the plan reaches, in a sentence."""
    if not plan.ranks:
        return "There is nothing to do: the whole network is within the budget."
    macs, parameters = plan.total("macs"), plan.total("parameters")
    layers = f"{len(plan.ranks)} of {len(plan.choices)} layers"
    return (
        f"Reached: {share(macs)} of the {count(macs[0])} multiply-adds an image and "
        f"{share(parameters)} of the {count(parameters[0])} weights, with factors in {layers}."
    )


def cost_highlights(networks: Networks) -> list[Highlight]:
    """What is left of the costs, and the speed where it was measured."""
    found = plan_highlights(networks.plan)
    return [*found, networks.times.highlight()] if networks.times else found


def plan_highlights(plan: Plan) -> list[Highlight]:
    """What a plan leaves of the costs."""
    found = []
    for measure, label in (("macs", "multiply-adds left"), ("parameters", "weights left")):
        pair = plan.total(measure)
        note = f"{count(pair[1])} of {count(pair[0])}"
        found.append(Highlight(label=label, value=share(pair), note=note))
    return found


def _sections(networks: Networks) -> list[Section]:
    plan, times = networks.plan, networks.times
    layers = layer_costs(plan, times.layers if times else None)
    notes = [
        'The "error" is what the plan expects the layer to lose of the variance of its outputs, '
        "before later layers make up for it."
    ]
    if times:
        items = times.network.items
        how = f"Times are for {items} images at once, each layer alone by its fastest algorithm."
        notes.append(f"{times} {how}")
    found = [
        layers_section(layers, "\n\n".join(notes)) if layers else None,
        spectra_section(plan, networks.spectra, networks.weighted),
        filters_section(plan, networks.dense, networks.small),
    ]
    return [section for section in found if section]


def _facts(networks: Networks) -> dict[str, Json]:
    plan, times = networks.plan, networks.times
    totals: dict[str, Json] = {m: plan.total(m) for m in ("parameters", "macs", "bytes")}
    layers = layer_facts(layer_costs(plan, times.layers if times else None))
    return {**totals, "layers": layers, **(times.facts() if times else {})}


def _curve_section(points: Sequence[Point]) -> Section:
    score = points[0].score
    wanted = "accuracy" if score.images.labelled else "same class as dense"
    measure = _measure(points)
    rows = [(f"{measure} left", "weights left", wanted)]
    rows += [_curve_row(point, measure) for point in points]
    rows.append(("100 %", "100 %", percent(score.dense or 0)))
    return Section(
        title="What each budget keeps",
        text=f"Each row is a network of its own, scored on {score.images}. The last row is the "
        "dense network. The networks are saved beside this report.",
        table=Table(rows=rows, left=0),
        pictures=[_curve_picture(points, measure)],
    )


def _curve_row(point: Point, measure: str) -> tuple[str, str, str]:
    cost, weights = (share(point.plan.total(own)) for own in (measure, "parameters"))
    return cost, weights, percent(point.score.small or 0)


def _curve_picture(points: Sequence[Point], measure: str) -> Picture:
    pairs = [(point.plan, point.score.small or 0.0) for point in points]
    labelled = points[0].score.images.labelled
    axis = "accuracy, %" if labelled else "images with the dense network's class, %"
    return Picture(
        name="curve",
        title="Accuracy over cost",
        about="Each dot is a network without fine-tuning; the dashed line is the dense network. "
        "Left of where the curve bends down, fine-tuning is needed.",
        draw=lambda: draw_curve({"compressed": pairs}, measure, points[0].score.dense, axis),
    )


def _measure(points: Sequence[Point]) -> str:
    budget = points[0].plan.budget
    return budget.measure if budget else "macs"


def _curve_facts(points: Sequence[Point]) -> dict[str, Json]:
    if not points:
        return {"curve": []}
    measure, first = _measure(points), points[0].score
    pairs = [(point.plan.total(measure)[1], point.score.small) for point in points]
    images = dataclasses.asdict(first.images)
    return {"curve": pairs, "curve_dense": first.dense, "scored_images": images}
