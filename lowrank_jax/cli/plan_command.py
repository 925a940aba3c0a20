"""The command `plan`: ranks within a budget, and the curve of what each budget keeps."""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lowrank_jax.calibration.collecting import Calibration
from lowrank_jax.cli.jobs import Job, add_job_options, load_job
from lowrank_jax.cli.options import new_command, shares
from lowrank_jax.cli.snippets import planning_lines
from lowrank_jax.compression.compressing import compress
from lowrank_jax.io.folders import whole_folder
from lowrank_jax.planning.curves import draw_curve
from lowrank_jax.planning.planner import plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.compiler import default_options
from lowrank_jax.report.planned import write_plan

Points = Sequence[tuple[Plan, float]]


def add_command(commands: Any) -> None:
    """Adds `plan` to the subcommands of ``lowrank-jax``."""
    about = "choose the ranks of a checkpoint within a budget, with unlabelled images"
    command = new_command(commands, "plan", about, run)
    add_job_options(command, "lowrank-jax-plan")
    about = "shares, such as 0.3,0.5,0.7, to compress to and to draw"
    command.add_argument("--curve", type=shares, help=about)
    about = (
        "classes of the images, .npy or .npz, where these have none: the curve is of accuracy, not "
        "of agreement with the dense network"
    )
    command.add_argument("--labels", help=about)


def run(args: argparse.Namespace) -> None:
    """Writes a plan and its table, and the curve if shares are given."""
    job = load_job(args)
    labels = job.labels(args.images, args.labels) if args.labels or args.curve else None
    found, [measure] = job.calibrate(), args.budget
    choose = planner(found, args)
    chosen = choose(**args.budget)
    points = curve(job, found, choose, measure, args.curve, labels) if args.curve else []
    facts = {
        "command": "lowrank-jax plan",
        "curve": [(planned.total(measure)[1], kept) for planned, kept in points],
    }
    with whole_folder(args.out) as folder:
        write_plan(folder, chosen, facts)
        if points:
            picture = _draw(points, measure, labels is not None)
            picture.savefig(folder / "curve.png", dpi=120)
    print(f"{chosen}\nThe plan is in {args.out / 'plan.json'}")
    if amount := job.amount():
        print(amount)
    print(planning_lines(job.model, job.kwargs, job.source, args.out / "plan.json"))


def planner(found: Calibration, args: argparse.Namespace) -> Callable[..., Plan]:
    """`plan` of a calibration; layers are timed once for all its plans."""
    timer = None
    if "latency" in args.budget:
        from lowrank_jax.tuning.timer import Timer  # loads with this budget alone

        timer = Timer(default_options())
    options = dict(batch=args.batch, multiple=args.multiple, timer=timer)
    return functools.partial(plan, found, **options)


def curve(
    job: Job,
    found: Calibration,
    choose: Callable[..., Plan],
    measure: str,
    shares: Sequence[float],
    labels: np.ndarray | None,
) -> Points:
    """For each share the plan, and the part of the images that its network classifies as wanted.

    Wanted are the labels, or what the dense network says.
    """
    wanted = job.classes(job.variables) if labels is None else labels
    points = []
    for share in shares:
        planned = choose(**{measure: share})
        small = compress(found, planned) if planned.ranks else job.variables
        kept = float(np.mean(job.classes(small) == wanted))
        print(f"{measure}={share}: {kept:.2%}", flush=True)
        points.append((planned, kept))
    return points


def _draw(points: Points, measure: str, accuracy: bool) -> Any:
    figure = draw_curve({"compressed": points}, measure=measure)
    if not accuracy:
        figure.axes[0].set_ylabel("images classified as by the dense network, %")
    return figure
