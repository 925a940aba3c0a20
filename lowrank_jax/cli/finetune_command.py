"""The command `finetune`: trains a checkpoint, and goes on where it was stopped."""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lowrank_jax.cli.comparing import plain_spectra
from lowrank_jax.cli.following import setting
from lowrank_jax.cli.jobs import CALIBRATION, Job, add_network_options, load_job, variables_from
from lowrank_jax.cli.options import new_command, positive, shares
from lowrank_jax.cli.recipe import add_recipe_options, loss_of, step_options
from lowrank_jax.cli.snippets import loading_lines
from lowrank_jax.compression.compressing import compress
from lowrank_jax.io.weights import load_weights, save_weights
from lowrank_jax.modules.nnx import variables_of
from lowrank_jax.nnx.training import finetune as finetune_module
from lowrank_jax.planning.plans import Plan
from lowrank_jax.report.next_steps import after_finetune
from lowrank_jax.report.planned import Networks
from lowrank_jax.report.record import Report
from lowrank_jax.report.tuned import Training, tuned_report
from lowrank_jax.report.writing import write_report
from lowrank_jax.training.finetuning import RATE, TEACHES, count_steps, finetune
from lowrank_jax.training.fingerprints import fingerprint
from lowrank_jax.training.metrics import read_metrics
from lowrank_jax.training.order import batches_of
from lowrank_jax.training.origins import has_origin, new_origin, origin_of
from lowrank_jax.training.partition import trained_leaves
from lowrank_jax.training.shrinking import shrink, stage_folders
from lowrank_jax.tree.paths import factored_leaves

SCORED = 4096  # training images whose classes are compared with the labels
START, RESULT, PLAN = "start.npz", "variables.npz", "plan.json"


def add_command(commands: Any) -> None:
    """Adds `finetune` to the subcommands of ``lowrank-jax``."""
    about = "train a checkpoint, dense or decomposed; the same command goes on where it was stopped"
    command = new_command(commands, "finetune", about, run)
    command.set_defaults(goes_on=True)  # in a folder that an earlier run began
    add_network_options(command)
    add = command.add_argument
    about = "classes of the images, .npy or .npz, where these lack them; needed without a teacher"
    add("--labels", help=about)
    about = "plan.json, by which a dense checkpoint is compressed first; it is then the teacher"
    ranks = command.add_mutually_exclusive_group()
    ranks.add_argument("--plan", type=Path, help=about)
    about = (
        "falling shares of the macs, such as 0.7,0.5: a dense checkpoint is compressed to each "
        "and trained there"
    )
    ranks.add_argument("--shrink", type=shares, help=about)
    add("--teacher", help="dense checkpoint whose probabilities are targets, too")
    add_recipe_options(add)
    length = command.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=positive, help="batches of the whole run")
    length.add_argument("--epochs", type=positive, help="passes over the images")
    add("--batch-size", type=positive, default=128, help="images in a step")
    about = "layer, or regular expression of layers, that is not trained; once for each"
    add("--freeze", action="append", default=[], help=about)
    add("--save-every", type=positive, default=500, help="steps between two checkpoints")
    about = "of the run: its checkpoints, metrics and result"
    add("--out", type=Path, default=Path("lowrank-jax-finetune"), help=about)


def run(args: argparse.Namespace) -> None:
    """Trains the network, and writes its variables and a report into the folder of the run."""
    job = load_job(args)
    _check_network(job, args)
    labels = job.labels(args.images, args.labels)
    teacher = _teacher(job, args)
    wanted = loss_of(args, labels is not None, teacher is not None)
    data = job.images if labels is None else (job.images, labels)
    frozen = dict.fromkeys(args.freeze, False)
    trained_leaves(job.variables, frozen)  # refuses what does not do before minutes of work
    count = count_steps(batches_of(data, args.batch_size, args.seed), args.steps, args.epochs)
    names = ("steps", "epochs", "batch_size", "seed", "save_every")
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {"loss": wanted, "teacher": teacher if wanted.needs & TEACHES else None}
    options["trained"] = frozen
    options |= step_options(args, job.images.shape[1:3], job.class_count, count)
    known = {} if teacher is None else {"dense": teacher}
    plan: Plan | None
    if args.shrink:
        tuned, plan = _shrunk(job, data, options, args)
    else:
        plan = Plan.load(args.plan) if args.plan else None
        known["before"] = _start(job, plan, args.out)
        tuned = _trained(job, known["before"], data, folder=args.out, plan=plan, **options)
    save_weights(args.out / RESULT, job.model.weights(tuned))
    if plan is not None:
        plan.save(args.out / PLAN)
    report = _report(job, labels, known | {"after": tuned}, plan, args)
    write_report(args.out, report)
    print(report.summary)
    print(f"The network is {args.out / RESULT}.")
    print(f"The report is {args.out / 'report.html'}.")
    print(loading_lines(job.model, job.kwargs, args.out / RESULT))


def _check_network(job: Job, args: argparse.Namespace) -> None:
    """Refuses networks that the options cannot compress."""
    option = "--plan" if args.plan else "--shrink" if args.shrink else ""
    if option and factored_leaves(job.variables):
        raise ValueError(
            f"{option} needs a dense checkpoint, and {args.checkpoint} is decomposed; give the "
            f"dense one, or leave {option} out."
        )
    if args.shrink and job.model.is_nnx:
        raise ValueError(
            f"--shrink does not take {args.model}, a model of NNX; give a Linen model or a "
            "function, or use --plan."
        )


def _report(
    job: Job,
    labels: np.ndarray | None,
    trees: Mapping[str, Any],
    plan: Plan | None,
    args: argparse.Namespace,
) -> Report:
    """The report of a run whose networks are named as in `Training`."""
    every = -(-len(job.images) // SCORED)
    part = dataclasses.replace(job, images=job.images[::every])
    accuracy = {}
    if labels is not None:
        wanted = labels[::every]
        accuracy = {name: _accuracy(part, tree, wanted) for name, tree in trees.items()}
    folder = stage_folders(args.out, args.shrink)[-1] if args.shrink else args.out
    length = f"{args.epochs} epochs" if args.epochs else f"{args.steps} steps"
    steered = args.optimizer or f"learning rate up to {args.learning_rate or RATE}"
    training = Training(
        asked=f"{length} of batches of {args.batch_size}, {steered}",
        metrics=read_metrics(folder),
        accuracy=accuracy,
        scored=len(part.images),
    )
    own, networks = setting(args, job.model), _networks(job, trees["after"], plan)
    following = after_finetune(own, args.out / RESULT)
    return tuned_report(own.subject, training, networks, following)


def _accuracy(job: Job, tree: Any, labels: np.ndarray) -> float:
    return float(np.mean(job.classes(tree) == labels))


def _networks(job: Job, tuned: Any, plan: Plan | None) -> Networks | None:
    """The dense and the trained network; None where the dense one or the plan is not known."""
    if plan is None:
        return None
    values = plain_spectra(job, plan)
    return Networks(plan=plan, dense=job.variables, small=tuned, spectra=values, weighted=False)


def _shrunk(
    job: Job, data: Any, options: Mapping[str, Any], args: argparse.Namespace
) -> tuple[Any, Plan]:
    """The network at the last share of the macs, and its plan."""
    inputs = job.images[:CALIBRATION]
    schedule: dict[str, Any] = dict(macs=args.shrink, tune=options, folder=args.out)
    return shrink(job.apply, job.variables, inputs, data, **schedule, **job.kwargs)


def _trained(job: Job, start: Any, data: Any, teacher: Any, **options: Any) -> Any:
    """The variables after the training."""
    if not job.model.is_nnx:
        return finetune(job.apply, start, data, teacher=teacher, **options, **job.kwargs)
    module = job.model.filled(start)
    taught = None if teacher is None else job.model.filled(teacher)
    tuned = finetune_module(module, data, teacher=taught, **options, **job.kwargs)
    return variables_of(tuned)


def _teacher(job: Job, args: argparse.Namespace) -> Mapping[str, Any] | None:
    """The dense network, where there is one beside the trained one."""
    if args.teacher:
        tree = load_weights(args.teacher)
        found = variables_from(tree, args.teacher, job.model, job.images[:1], job.kwargs)
        return found.variables
    return job.variables if args.plan or args.shrink else None


def _start(job: Job, plan: Plan | None, folder: Path) -> Any:
    """The network before training; a run that goes on has it in its folder."""
    if plan is None:
        return job.variables
    ranks = {layer: repr(scheme) for layer, scheme in plan.ranks.items()}
    images, path = job.images[:CALIBRATION], folder / START
    origin = {"checkpoint": fingerprint(job.variables), "plan": json.dumps(ranks)}
    origin |= origin_of(images, job.kwargs)
    if has_origin(folder, origin) and path.exists():
        return jax.tree.map(jax.numpy.asarray, load_weights(path))
    small = compress(job.apply, job.variables, images, plan, **job.kwargs)
    with new_origin(folder, origin):
        save_weights(path, job.model.weights(small))
    return small
