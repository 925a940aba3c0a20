"""The command `plan`: ranks within a budget, and the curve of what each budget keeps."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax.calibration.collecting import Calibration
from lowrank_jax.cli.comparing import Comparison, add_comparison_options, times
from lowrank_jax.cli.following import setting
from lowrank_jax.cli.jobs import Job, add_job_options, load_job
from lowrank_jax.cli.options import new_command, shares
from lowrank_jax.cli.snippets import planning_lines
from lowrank_jax.compression.compressing import compress
from lowrank_jax.io.folders import whole_folder
from lowrank_jax.io.weights import save_weights
from lowrank_jax.planning.planner import calibrated_spectra, plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.compiler import default_options
from lowrank_jax.report.next_steps import after_plan
from lowrank_jax.report.planned import Networks, Point, plan_report
from lowrank_jax.report.writing import write_report
from lowrank_jax.tree.decomposing import decompose


def add_command(commands: Any) -> None:
    """Adds `plan` to the subcommands of ``lowrank-jax``."""
    about = "choose the ranks of a checkpoint within a budget, with unlabelled images"
    command = new_command(commands, "plan", about, run)
    add_job_options(command, "lowrank-jax-plan")
    about = (
        "shares, such as 0.3,0.5,0.7, to compress to, to draw and to save; of 256 images or more "
        "every fourth is scored and left out of the fit"
    )
    command.add_argument("--curve", type=shares, help=about)
    add_comparison_options(command)


def run(args: argparse.Namespace) -> None:
    """Writes a plan, the networks of the curve if shares are given, and a report."""
    if args.labels and not args.curve:
        raise ValueError(
            "--labels needs --curve, whose networks it scores; give shares such as --curve 0.3,0.5."
        )
    job = load_job(args)
    if args.curve and job.class_count < 2:
        raise ValueError(
            "--curve needs a network that gives classes, and this one gives one number; leave "
            "--curve out."
        )
    compared = None
    if args.curve:
        compared = Comparison.of(job, job.labels(args.images, args.labels), hold_out=True)
    fitted = compared.fitted if compared else job
    found = fitted.calibrate()
    choose = planner(found, args)
    chosen = choose(**args.budget)
    points = curve(compared, found, choose, args) if compared else []
    small = decompose(job.variables, chosen, found.trace) if chosen.ranks else job.variables
    networks = Networks(
        plan=chosen,
        dense=job.variables,
        small=small,
        spectra=calibrated_spectra(found),
        weighted=True,
        times=times(job, small, chosen, args.batch) if args.time else None,
    )
    own = setting(args, job.model)
    report = plan_report(own.subject, networks, points, after_plan(own, args.out))
    with whole_folder(args.out) as folder:
        chosen.save(folder / "plan.json")
        for point in points:
            _save(folder, point, job)
        write_report(folder, report)
    print(f"{chosen}\nThe plan is {args.out / 'plan.json'}, the report {args.out / 'report.html'}.")
    source = "" if chosen.changed else job.source  # such a plan needs the program, too
    print(planning_lines(job.model, job.kwargs, source, args.out / "plan.json"))


def planner(found: Calibration, args: argparse.Namespace) -> Callable[..., Plan]:
    """`plan` of a calibration; layers are timed once for all its plans."""
    options = dict(multiple=args.multiple)
    if "latency" in args.budget:
        from lowrank_jax.tuning.timer import Timer  # loads with this budget alone

        options |= dict(batch=args.batch, timer=Timer(default_options()))
    return functools.partial(plan, found, **options)


def curve(
    compared: Comparison,
    found: Calibration,
    choose: Callable[..., Plan],
    args: argparse.Namespace,
) -> Sequence[Point]:
    """For each share of the budget the plan, its network, and how well that does."""
    [measure] = args.budget
    points = []
    for amount in args.curve:
        planned = choose(**{measure: amount})
        small = compress(found, planned) if planned.ranks else compared.fitted.variables
        score = compared.score(small)
        print(f"{measure}={amount}: {score}", flush=True)
        points.append(Point(amount=amount, plan=planned, small=small, score=score))
    return points


def _save(folder: Path, point: Point, job: Job) -> None:
    """Writes a network of the curve, and its plan."""
    save_weights(folder / f"curve-{point.amount}.npz", job.model.weights(point.small))
    point.plan.save(folder / f"curve-{point.amount}-plan.json")
