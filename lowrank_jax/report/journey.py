"""The report of `demo` and `cifar10`: every network of the journey beside the others."""

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
from lowrank_jax.planning.plans import Choice, Plan
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.report.filters import filters_section
from lowrank_jax.report.pictures import draw_accuracy, draw_costs
from lowrank_jax.report.planned import plan_highlights
from lowrank_jax.report.record import Highlight, Picture, Report, Section, Table
from lowrank_jax.report.spectra import spectra_section
from lowrank_jax.report.tables import markdown_table, percent
from lowrank_jax.report.times import speed_highlight, time_facts

FASTEST = ("low-rank, fast", "dense, fast")  # of the times


def journey_report(journey: Journey, title: str, out: Path) -> Report:
    """The report of `demo` and `cifar10`.

    Args:
        journey: what was found.
        title: the command.
        out: folder of the results, as the next steps name it.
    """
    return Report(
        title=title,
        summary=_summary(journey),
        machine=journey.machine,
        highlights=_highlights(journey),
        sections=[*_sections(journey), *_following(out)],
        facts=figures(journey),
    )


def _summary(journey: Journey) -> str:
    result, plan = journey.result, journey.planned
    macs, weights = (_fewer(plan, measure) for measure in ("macs", "parameters"))
    return (
        f"Asked for: {_given(journey)}, and ranks by a plan at no more multiply-adds. Reached by "
        f"the plan: {percent(result.accuracy)} test accuracy, of the dense network "
        f"{percent(journey.stages[DENSE].accuracy)}, with {macs} times fewer multiply-adds and "
        f"{weights} times fewer weights."
    )


def _fewer(plan: Plan, measure: str) -> str:
    dense, low = plan.total(measure)
    return f"{dense / low:.1f}"


def _highlights(journey: Journey) -> list[Highlight]:
    plan, note = journey.planned, f"dense {percent(journey.stages[DENSE].accuracy)}"
    return [
        Highlight(label="test accuracy", value=percent(journey.result.accuracy), note=note),
        *plan_highlights(plan),
        speed_highlight(journey.times, *FASTEST),
    ]


def _sections(journey: Journey) -> list[Section]:
    plan, dense = journey.planned, journey.stages[DENSE].variables
    names = {path: {own.first: journey.spectra[path]} for path, own in journey.given.ranks.items()}
    stages = Section(
        title="What each network keeps and costs",
        text=f"Each row is a network. {_sure(journey)}\n\n{_speed(journey)}",
        table=Table(rows=stage_rows(journey)),
        pictures=[_accuracy_picture(journey)],
    )
    ranks = Section(
        title="The ranks, as given and as planned",
        text="Both networks have about as many multiply-adds. The plan spends them where the "
        "images show that they are needed.",
        table=Table(rows=layer_rows(journey)),
        pictures=[_cost_picture(journey, measure) for measure in ("parameters", "macs")],
    )
    others = [
        spectra_section(journey.given, Spectra(names), weighted=False),
        filters_section(plan, dense, journey.result.variables),
    ]
    return [stages, ranks, *(section for section in others if section)]


def _accuracy_picture(journey: Journey) -> Picture:
    return Picture(
        name="accuracy",
        title="Test accuracy of each network",
        about="The dashed line is the dense network. Light bars have the given ranks, dark ones "
        "those of the plan. Two bars that differ by less than the error of an accuracy are alike.",
        draw=lambda: draw_accuracy(journey),
    )


def _cost_picture(journey: Journey, measure: str) -> Picture:
    names = {"parameters": "weights", "macs": "multiply-adds"}
    return Picture(
        name=names[measure].replace("-", "_"),
        title=f"{names[measure].capitalize()} of each layer",
        about="Grey is the layer as it was, light blue at the given rank, blue at the planned one.",
        draw=lambda: draw_costs(journey, [measure]),
    )


def _following(out: Path) -> list[Section]:
    lines = [
        "import lowrank_jax as lr",
        "from lowrank_jax.models import NIN",
        "",
        f"small = lr.load_weights({str(out / 'lowrank.npz')!r})",
        "logits = lr.lowrank(NIN().apply)(small, images)  # (batch, 32, 32, 3), normalised",
    ]
    text = (
        "The network is an ordinary tree of arrays, and the model's code is unchanged: lowrank "
        "runs it with the factors in the kernels' place."
    )
    own = (
        "The same for a checkpoint of yours: name the model by its import path, give images "
        "without labels, and say how much may be left."
    )
    command = (
        "lowrank-jax compress --checkpoint dense.npz --model package.module:Net "
        "--images images.npy --budget macs=0.5"
    )
    return [
        Section(title="What to do next: run it", text=text, code="\n".join(lines)),
        Section(title="What to do next: compress your own", text=own, code=command),
    ]


def markdown(journey: Journey) -> str:
    """The figures as Markdown tables, readable on a terminal too."""
    stages, layers = (Table(rows=rows(journey)) for rows in (stage_rows, layer_rows))
    machine = f"Machine: {journey.machine}"
    sentences = (_sure(journey), _speed(journey))
    return "\n\n".join((markdown_table(stages), *sentences, markdown_table(layers), machine))


def _speed(journey: Journey) -> str:
    low, median, high = journey.times.ratio(*FASTEST)
    passes = len(journey.times.seconds["dense"])
    return (
        f"With lowrank_jax.fast the low-rank network runs {median:.2f} times the images/s of the "
        f"dense one (quartiles {low:.2f} to {high:.2f}; batch {journey.times.items}, {passes} "
        "passes of each in turn)."
    )


def _sure(journey: Journey) -> str:
    return f"An accuracy on {journey.tests:,} images is known to within {_noise(journey)}."


def stage_rows(journey: Journey) -> list[tuple[str, ...]]:
    """What each network keeps and costs: the table that the demo is about."""
    head: tuple[str, ...] = (
        "network",
        "test accuracy",
        "multiply-adds",
        "weights",
        "jax.jit",
        "lowrank_jax.fast",
    )
    rows = [head]
    for name, stage in journey.stages.items():
        costs = (_cost(journey, stage, "macs"), _cost(journey, stage, "parameters"))
        score = f"{stage.accuracy:.2%}"
        rows.append((_label(journey, name), score, *costs, *_rates(journey, name)))
    return rows


def layer_rows(journey: Journey) -> list[tuple[str, ...]]:
    """The ranks and the multiply-adds of every layer, as given and as planned."""
    macs = "multiply-adds"
    head: tuple[str, ...] = ("layer", macs, "given rank", macs, "planned rank", macs)
    rows = [head]
    for first, second in zip(journey.given, journey.planned, strict=True):
        dense, low = first.macs
        planned = f"{second.macs[1]:,}"
        rows.append((first.path, f"{dense:,}", _rank(first), f"{low:,}", _rank(second), planned))
    return rows


def figures(journey: Journey) -> dict:
    """The figures as plain data."""
    return {
        "images": journey.images,
        "tests": journey.tests,
        "stages": {name: _facts(stage) for name, stage in journey.stages.items()},
        **time_facts(journey.times, *FASTEST),
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
    run = {DENSE: "dense", journey.last: "low-rank"}.get(name)
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
