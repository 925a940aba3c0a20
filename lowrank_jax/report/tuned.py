"""The report of `finetune`: what the network learned, and what is left to do."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lowrank_jax.report.costs import layer_costs, layer_facts, layers_section
from lowrank_jax.report.drawing import AFTER, new_figure
from lowrank_jax.report.filters import filters_section
from lowrank_jax.report.planned import Networks, cost_highlights
from lowrank_jax.report.record import Highlight, Json, Picture, Report, Section, Table
from lowrank_jax.report.spectra import spectra_section
from lowrank_jax.report.tables import percent
from lowrank_jax.tuning.device import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line = Mapping[str, float]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Training:
    """What a training was and what it gave.

    Attributes:
        asked: the length, and the learning rate or the optimiser, in words.
        metrics: lines of the run, each with its "step" and its "loss".
        accuracy: "dense", "before" and "after", as far as they are known, to the share of training
            images that this network classifies as labelled; empty without labels.
        scored: how many images these are.
    """

    asked: str
    metrics: Sequence[Line]
    accuracy: Mapping[str, float]
    scored: int


def tuned_report(
    subject: str, training: Training, networks: Networks | None, following: Sequence[Section]
) -> Report:
    """The report of `finetune`.

    Args:
        subject: the network, in words.
        training: what was done.
        networks: the dense and the trained network, where a plan was given.
        following: what comes next, of `lowrank_jax.report.next_steps.after_finetune`.
    """
    return Report(
        title="lowrank-jax finetune",
        subject=subject,
        summary=f"Asked for: {training.asked}. {_reached(training)}",
        machine=machine(),
        highlights=[*_highlights(training), *(cost_highlights(networks) if networks else [])],
        sections=[_learned(training), *(_network(networks) if networks else []), *following],
        facts=_facts(training, networks),
    )


def _reached(training: Training) -> str:
    losses = _losses(training)
    text = ""
    if len(losses) == 1:
        text = f"The mean loss was {losses[0][1]:.4g}."
    elif losses:
        text = f"The loss went from {losses[0][1]:.4g} to {losses[-1][1]:.4g}."
    if not training.accuracy:
        return text
    shares = ", ".join(f"{name} {percent(share)}" for name, share in training.accuracy.items())
    return f"{text} Accuracy on {training.scored:,} training images: {shares}."


def _losses(training: Training) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in training.metrics if "loss" in line]


def _highlights(training: Training) -> list[Highlight]:
    if "after" not in training.accuracy:
        return [Highlight(label="loss", value=f"{y:.4g}") for _, y in _losses(training)[-1:]]
    notes = [f"{name} {percent(x)}" for name, x in training.accuracy.items() if name != "after"]
    value = percent(training.accuracy["after"])
    return [Highlight(label="training accuracy", value=value, note=", ".join(notes))]


def _learned(training: Training) -> Section:
    rows = [("network", "training accuracy")]
    rows += [(name, percent(share)) for name, share in training.accuracy.items()]
    text = (
        "A training accuracy is that of the images which the network learned from; on new images "
        "it is lower. Try the network on images of your own that it has not seen."
    )
    return Section(
        title="What was learned",
        text=text if training.accuracy else "",
        table=Table(rows=rows) if training.accuracy else None,
        pictures=[_picture(training)] if len(_losses(training)) > 1 else [],
    )


def _picture(training: Training) -> Picture:
    return Picture(
        name="loss",
        title="Loss while training",
        about="The mean loss of the batches up to each step. It should fall and then level out; "
        "if it still falls at the end, more epochs help.",
        draw=lambda: _draw(_losses(training)),
    )


def _draw(losses: Sequence[tuple[float, float]]) -> "Figure":
    figure, [axis] = new_figure(2.8)
    axis.plot(*zip(*losses, strict=True), color=AFTER)
    axis.set(xlabel="step", ylabel="loss")
    axis.grid(axis="y")
    return figure


def _network(networks: Networks) -> list[Section]:
    found = [
        layers_section(layer_costs(networks.plan)),
        spectra_section(networks.plan, networks.spectra, networks.weighted),
        filters_section(networks.plan, networks.dense, networks.small),
    ]
    return [section for section in found if section]


def _facts(training: Training, networks: Networks | None) -> dict[str, Json]:
    layers: dict[str, Json] = (
        {"layers": layer_facts(layer_costs(networks.plan))} if networks else {}
    )
    return {"accuracy": training.accuracy, "metrics": list(training.metrics), **layers}
