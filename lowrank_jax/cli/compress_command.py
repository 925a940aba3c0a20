"""The command `compress`: a compressed checkpoint, fitted to unlabelled images."""

import argparse
import time
from pathlib import Path
from typing import Any

from lowrank_jax.cli.jobs import Job, add_job_options, load_job
from lowrank_jax.cli.options import new_command, whole
from lowrank_jax.cli.plan_command import planner
from lowrank_jax.cli.snippets import loading_lines
from lowrank_jax.compression.compressing import compress
from lowrank_jax.io.folders import whole_folder
from lowrank_jax.io.weights import save_weights
from lowrank_jax.planning.plans import Plan
from lowrank_jax.report.planned import write_plan


def add_command(commands: Any) -> None:
    """Adds `compress` to the subcommands of ``lowrank-jax``."""
    about = (
        "choose the ranks, fit the factors to unlabelled images and write the compressed checkpoint"
    )
    command = new_command(commands, "compress", about, run)
    add_job_options(command, "lowrank-jax-compress")
    about = "plan.json of an earlier run, instead of a budget"
    command.add_argument("--plan", type=Path, help=about)
    about = "alternating refinements of the factors"
    command.add_argument("--sweeps", type=whole(0), default=1, help=about)


def run(args: argparse.Namespace) -> None:
    """Writes the compressed checkpoint with its plan and a report."""
    job = load_job(args)
    start = time.perf_counter()
    chosen, small, fits = compressed(job, args)
    seconds = time.perf_counter() - start
    error = job.output_error(small)
    facts = {
        "command": "lowrank-jax compress",
        "seconds": seconds,
        "output_error": error,
        "held_out_error": {path: _held_out(own) for path, own in fits.items()},
    }
    with whole_folder(args.out) as folder:
        save_weights(folder / "variables.npz", job.model.weights(small))
        write_plan(folder, chosen, facts)
    if not chosen.ranks:
        print("There is nothing to do: the whole network is within the budget.")
    print(f"{chosen}\nRelative error of the outputs on the images given: {error:.4f}")
    if amount := job.amount():
        print(amount)
    result = args.out / "variables.npz"
    print(f"It took {seconds:.0f} s. The compressed checkpoint is {result}.")
    print(loading_lines(job.model, job.kwargs, result))


def compressed(job: Job, args: argparse.Namespace) -> tuple[Plan, Any, dict]:
    """The plan, the tree and the fits; a new plan and its fits share one calibration."""
    options: dict[str, Any] = dict(sweeps=args.sweeps, return_fits=True)
    if args.plan:
        chosen = Plan.load(args.plan)
        given = (job.apply, job.variables, job.images, chosen)
        return chosen, *compress(*given, **options, **job.kwargs)  # type: ignore[misc]
    found = job.calibrate()
    chosen = planner(found, args)(**args.budget)
    return chosen, *compress(found, chosen, **options)


def _held_out(fits: dict) -> list[float]:
    """The errors of a layer's kernels on images that they were not fitted to."""
    return [float(fit.held_out) for fit in fits.values()]
