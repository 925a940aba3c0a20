"""The report of an experiment: a table, pictures and the figures as JSON, in one folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from lowrank_jax.experiments.journey import (
    CLOSED,
    DENSE,
    FITTED,
    PLANNED,
    PLANNED_TUNED,
    TUNED,
    Journey,
    Stage,
)
from lowrank_jax.io.weights import save_weights
from lowrank_jax.planning.plans import Choice
from lowrank_jax.report.pictures import PICTURES


def write_report(folder: Path, journey: Journey, title: str) -> None:
    """Writes report.md, report.json, pictures and the low-rank weights into a folder."""
    text = f"# {title}\n\n{markdown(journey)}\n"
    for name, draw in PICTURES.items():
        figure = draw(journey)
        figure.savefig(folder / f"{name}.png", dpi=120)
        text += f"\n![{name}]({name}.png)\n"
    (folder / "report.md").write_text(text)
    (folder / "report.json").write_text(json.dumps(figures(journey), indent=1) + "\n")
    save_weights(folder / "lowrank.npz", journey.result.variables)


def markdown(journey: Journey) -> str:
    """The figures as Markdown tables, readable on a terminal too."""
    low, median, high = journey.times.ratio("low-rank, fast", "dense, fast")
    passes = len(journey.times.seconds["dense"])
    speed = (
        f"With `fast` the low-rank network runs {median:.2f} times the images/s of the dense one "
        f"(quartiles {low:.2f} to {high:.2f}; batch {journey.times.items}, {passes} passes of each "
        "in turn)."
    )
    sure = f"An accuracy on {journey.tests:,} images is known to within {_noise(journey)}."
    machine = f"Machine: {journey.machine}"
    return "\n\n".join((stage_table(journey), sure, speed, layer_table(journey), machine))


def stage_table(journey: Journey) -> str:
    """What each network keeps and costs: the table that the demo is about."""
    head = ("network", "test accuracy", "multiply-adds", "weights", "jax.jit", "lowrank_jax.fast")
    rows = [head]
    for name, stage in journey.stages.items():
        costs = (_cost(journey, stage, "macs"), _cost(journey, stage, "parameters"))
        score = f"{stage.accuracy:.2%}"
        rows.append((_label(journey, name), score, *costs, *_rates(journey, name)))
    return table(rows)


def layer_table(journey: Journey) -> str:
    """The ranks and the multiply-adds of every layer, as given and as planned."""
    macs = "multiply-adds"
    rows = [("layer", macs, "given rank", macs, "planned rank", macs)]
    for first, second in zip(journey.given, journey.planned, strict=True):
        dense, low = first.macs
        planned = f"{second.macs[1]:,}"
        rows.append((first.path, f"{dense:,}", _rank(first), f"{low:,}", _rank(second), planned))
    return table(rows)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head, the first column is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) + " |"
        for r in rows
    ]
    rule = (
        "| "
        + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        + " |"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def figures(journey: Journey) -> dict:
    """The figures as plain data."""
    names = ("low", "median", "high")
    times = {
        name: dict(zip(names, journey.times.rate(name), strict=True))
        for name in journey.times.seconds
    }
    ratio = journey.times.ratio("low-rank, fast", "dense, fast")
    return {
        "machine": journey.machine,
        "images": journey.images,
        "tests": journey.tests,
        "stages": {name: _facts(stage) for name, stage in journey.stages.items()},
        "batch_size": journey.times.items,
        "images_per_second": times,
        "speed_up": dict(zip(names, ratio, strict=True)),
    }


def _facts(stage: Stage) -> dict:
    if stage.plan is None:
        return {"accuracy": stage.accuracy}
    layers = {choice.path: (choice.parameters, choice.macs) for choice in stage.plan}
    ranks = {path: scheme.rank for path, scheme in stage.plan.ranks.items()}
    totals = {measure: stage.plan.total(measure) for measure in ("parameters", "macs")}
    return {
        "accuracy": stage.accuracy,
        "curve": stage.curve,
        "ranks": ranks,
        "layers": layers,
        **totals,
    }


def costs(pair: Sequence[int]) -> tuple[str, str, str]:
    """Dense, low-rank and their ratio, as the columns of a table."""
    return f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[0] / pair[1]:.2f}"


def _label(journey: Journey, name: str) -> str:
    """The name of a stage in words."""
    images = f"{journey.images:,} images"
    words = {
        CLOSED: f"{_given(journey)}: closed form",
        FITTED: f"{_given(journey)}: fitted to {images}",
        TUNED: f"{_given(journey)}: fitted, then tuned",
        PLANNED: f"ranks by plan: fitted to {images}",
        PLANNED_TUNED: "ranks by plan: fitted, then tuned",
    }
    return words.get(name, name)


def _given(journey: Journey) -> str:
    ranks = journey.given.ranks.values()
    return f"ranks {', '.join(str(scheme.rank) for scheme in ranks)}"


def _cost(journey: Journey, stage: Stage, measure: str) -> str:
    plan = stage.plan or journey.planned
    dense, low = plan.total(measure)
    if stage.plan is None:
        return f"{dense / 1e6:.2f} M"
    return f"{low / 1e6:.2f} M ({dense / low:.2f}x fewer)"


def _rates(journey: Journey, name: str) -> tuple[str, str]:
    """Images per second, of the stages that were timed."""
    last = [*journey.stages][-1]
    run = {DENSE: "dense", last: "low-rank"}.get(name)
    if run is None:
        return "", ""
    plain, found = (journey.times.rate(key)[1] for key in (run, f"{run}, fast"))
    return f"{plain:,.0f} images/s", f"{found:,.0f} images/s"


def _rank(choice: Choice) -> str:
    return "dense" if choice.scheme is None else str(choice.scheme.rank)


def _noise(journey: Journey) -> str:
    """Two standard deviations of the dense network's accuracy."""
    share = journey.stages[DENSE].accuracy
    return f"{200 * (share * (1 - share) / journey.tests) ** 0.5:.1f} points"
