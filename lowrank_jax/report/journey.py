"""The report of an experiment: a table, pictures and the figures as JSON, in one folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from lowrank_jax.experiments.cifar10 import Journey
from lowrank_jax.io.weights import save_weights
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
    save_weights(folder / "lowrank.npz", journey.variables)


def markdown(journey: Journey) -> str:
    """The figures as Markdown tables, readable on a terminal too."""
    rows = [("layer", "rank", "parameters", "low-rank", "factor", "macs", "low-rank", "factor")]
    for layer in journey.layers:
        rank = "dense" if layer.rank is None else str(layer.rank)
        rows.append((layer.name, rank, *costs(layer.parameters), *costs(layer.macs)))
    rows.append(
        (
            "convolutions",
            "",
            *costs(_total(journey, "parameters")),
            *costs(_total(journey, "macs")),
        )
    )
    scores = [("network", "test accuracy", "images/s: median (quartiles)")]
    for name, score in journey.accuracy.items():
        run = {"dense": "dense", "fine-tuned": "low-rank"}.get(name)
        scores.append((name, f"{score:.2%}", "" if run is None else _rate(journey.times.rate(run))))
    low, median, high = journey.times.ratio("low-rank", "dense")
    passes = len(journey.times.seconds["dense"])
    speed = (
        f"Low-rank over dense: {median:.2f} times the images/s (quartiles {low:.2f} to "
        f"{high:.2f}), batch {journey.times.items}, {passes} passes of each in turn."
    )
    return f"{table(rows)}\n\n{table(scores)}\n\n{speed}\n\nMachine: {journey.machine}"


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
    layers = [vars(layer) for layer in journey.layers]
    times = {
        name: dict(zip(("low", "median", "high"), journey.times.rate(name), strict=True))
        for name in journey.times.seconds
    }
    ratio = dict(
        zip(("low", "median", "high"), journey.times.ratio("low-rank", "dense"), strict=True)
    )
    return {
        "machine": journey.machine,
        "layers": layers,
        "accuracy": journey.accuracy,
        "fine_tuning": journey.curve,
        "batch_size": journey.times.items,
        "images_per_second": times,
        "speed_up": ratio,
    }


def costs(pair: Sequence[int]) -> tuple[str, str, str]:
    """Dense, low-rank and their ratio, as the columns of a table."""
    return f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[0] / pair[1]:.2f}"


def _total(journey: Journey, field: str) -> tuple[int, int]:
    pairs = [getattr(layer, field) for layer in journey.layers]
    return sum(dense for dense, _ in pairs), sum(low for _, low in pairs)


def _rate(quartiles: tuple[float, float, float]) -> str:
    low, median, high = quartiles
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"
