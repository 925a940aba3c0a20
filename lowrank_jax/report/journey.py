"""The report of an experiment: a table, pictures and the figures as JSON, in one folder."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowrank_jax.io.weights import save_weights
from lowrank_jax.training.experiment import Journey

DENSE, LOWRANK = "#8c8c8c", "#1f77b4"


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a scratch folder that becomes ``out`` at the end, or vanishes if anything fails."""
    out = Path(out).resolve()
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def check_out(out: Path) -> None:
    """Raises unless the folder is new, empty or an earlier report, which alone may be replaced."""
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "report.json").exists()
    ):
        raise FileExistsError(
            f"{out} exists and is no report of an earlier run; give another folder with --out."
        )


def write_report(folder: Path, journey: Journey, title: str) -> None:
    """Writes report.md, report.json, three pictures and the low-rank weights into an existing
    folder."""
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
        rows.append((layer.name, rank, *_costs(layer.parameters), *_costs(layer.macs)))
    rows.append(
        (
            "convolutions",
            "",
            *_costs(_total(journey, "parameters")),
            *_costs(_total(journey, "macs")),
        )
    )
    scores = [("network", "test accuracy", "images/s: median (quartiles)")]
    for name, score in journey.accuracy.items():
        run = {"dense": "dense", "fine-tuned": "low-rank"}.get(name)
        scores.append((name, f"{score:.2%}", "" if run is None else _rate(journey.times.rate(run))))
    low, median, high = journey.times.ratio("low-rank", "dense")
    speed = f"Low-rank over dense: {median:.2f} times the images/s (quartiles {low:.2f} to {high:.2f}), "
    speed += f"batch {journey.times.items}, {len(journey.times.seconds['dense'])} passes of each in turn."
    return f"{table(rows)}\n\n{table(scores)}\n\n{speed}\n\nMachine: {journey.machine}"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table, the first row its head; the first column left, the others right aligned."""
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


def _costs(pair: tuple[int, int]) -> tuple[str, str, str]:
    return f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[0] / pair[1]:.2f}"


def _total(journey: Journey, field: str) -> tuple[int, int]:
    pairs = [getattr(layer, field) for layer in journey.layers]
    return sum(dense for dense, _ in pairs), sum(low for _, low in pairs)


def _rate(quartiles: tuple[float, float, float]) -> str:
    low, median, high = quartiles
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def _figure(columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def draw_spectra(journey: Journey):
    """The singular values of each decomposed layer, with the cut."""
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


def draw_costs(journey: Journey):
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
        axis.set_title(
            field.replace("_", "-") + (" per image" if field != "parameters" else ""), size=10
        )
        axis.legend(frameon=False)
    return figure


def draw_accuracy(journey: Journey):
    """Accuracy along the fine-tuning, from the decomposed network on, beside the dense
    network's."""
    figure, (axis,) = _figure(1)
    curve = [journey.accuracy["decomposed"], *journey.curve]
    axis.plot(
        range(len(curve)), [100 * value for value in curve], "o-", color=LOWRANK, label="low-rank"
    )
    axis.axhline(100 * journey.accuracy["dense"], color=DENSE, ls="--", label="dense")
    axis.set(xlabel="epochs of fine-tuning", ylabel="test accuracy, %", xticks=range(len(curve)))
    axis.legend(frameon=False)
    return figure


PICTURES = {"spectra": draw_spectra, "costs": draw_costs, "accuracy": draw_accuracy}
