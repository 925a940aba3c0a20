"""The command `compress`: a compressed checkpoint, fitted to unlabelled images."""

import argparse
import time
from pathlib import Path
from typing import Any

from lowrank_jax.cli.comparing import (
    Comparison,
    add_comparison_options,
    plain_spectra,
    times,
)
from lowrank_jax.cli.following import setting
from lowrank_jax.cli.jobs import Job, add_job_options, load_job
from lowrank_jax.cli.options import new_command, whole
from lowrank_jax.cli.plan_command import planner
from lowrank_jax.cli.snippets import loading_lines
from lowrank_jax.compression.compressing import compress
from lowrank_jax.io.folders import whole_folder
from lowrank_jax.io.weights import save_weights
from lowrank_jax.planning.planner import calibrated_spectra
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.spectra import Spectra
from lowrank_jax.report.next_steps import after_compress
from lowrank_jax.report.planned import Networks, compress_report
from lowrank_jax.report.record import Json
from lowrank_jax.report.writing import write_report

Compressed = tuple[Plan, Any, dict, Spectra]  # the plan, the tree, the fits, singular values


def add_command(commands: Any) -> None:
    """Adds `compress` to the subcommands of ``lowrank-jax``."""
    about = (
        "choose the ranks, fit the factors to unlabelled images and write the compressed checkpoint"
    )
    command = new_command(commands, "compress", about, run)
    ranks = add_job_options(command, "lowrank-jax-compress")
    about = "plan.json of an earlier run, instead of a budget"
    ranks.add_argument("--plan", type=Path, help=about)
    about = "alternating refinements of the factors"
    command.add_argument("--sweeps", type=whole(0), default=1, help=about)
    about = (
        "gradient steps, such as 200, of each block towards the dense network's outputs; no labels"
    )
    command.add_argument("--steps", type=whole(0), default=0, help=about)
    add_comparison_options(command)


def run(args: argparse.Namespace) -> None:
    """Writes the compressed checkpoint with its plan and a report."""
    if args.plan and args.multiple:
        raise ValueError(
            f"--multiple {args.multiple} restricts ranks that a budget chooses, and --plan gives "
            "them; leave --multiple out."
        )
    job = load_job(args)
    labels = job.labels(args.images, args.labels)
    compared = Comparison.of(job, labels, hold_out=labels is not None)
    start = time.perf_counter()
    chosen, small, fits, values = compressed(compared.fitted, args)
    elapsed = time.perf_counter() - start
    score = compared.score(small)
    networks = Networks(
        plan=chosen,
        dense=job.variables,
        small=small,
        spectra=values,
        weighted=not args.plan,
        times=times(job, small, chosen, args.batch) if args.time else None,
    )
    held_out = {path: _held_out(own) for path, own in fits.items()}
    facts: dict[str, Json] = {"seconds": elapsed, "held_out_error": held_out}
    own = setting(args, job.model)
    following = after_compress(own, args.out, score)
    report = compress_report(own.subject, networks, score, following, facts)
    with whole_folder(args.out) as folder:
        save_weights(folder / "variables.npz", job.model.weights(small))
        chosen.save(folder / "plan.json")
        write_report(folder, report)
    print(f"{chosen}\n{score}")
    if not chosen.ranks:
        print("There is nothing to do: the whole network is within the budget.")
    result = args.out / "variables.npz"
    print(f"It took {elapsed:.0f} s. The compressed checkpoint is {result}.")
    print(f"The report is {args.out / 'report.html'}.")
    print(loading_lines(job.model, job.kwargs, result))


def compressed(job: Job, args: argparse.Namespace) -> Compressed:
    """The plan, the tree, the fits and the spectra; a new plan shares its calibration."""
    options: dict[str, Any] = dict(sweeps=args.sweeps, steps=args.steps, return_fits=True)
    if args.plan:
        chosen = Plan.load(args.plan)
        given = (job.apply, job.variables, job.images, chosen)
        small, fits = compress(*given, **options, **job.kwargs)  # type: ignore[misc]
        return chosen, small, fits, plain_spectra(job, chosen)
    found = job.calibrate()
    chosen = planner(found, args)(**args.budget)
    small, fits = compress(found, chosen, **options)
    return chosen, small, fits, calibrated_spectra(found)


def _held_out(fits: dict) -> list[float]:
    """The errors of a layer's kernels on images that they were not fitted to."""
    return [float(fit.held_out) for fit in fits.values()]
