"""The commands `plan` and `compress` for a checkpoint and a model of the user's own."""

import argparse
import functools
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def add_commands(commands: Any) -> None:
    """Adds `plan` and `compress` to the subcommands of ``lowrank-jax``."""
    about = "choose the ranks of a checkpoint within a budget, with unlabelled images"
    plan = commands.add_parser("plan", help=about, description=about)
    about = (
        "choose the ranks, fit the factors to unlabelled images and write the compressed checkpoint"
    )
    compress = commands.add_parser("compress", help=about, description=about)
    for command, run, folder in (
        (plan, run_plan, "lowrank-jax-plan"),
        (compress, run_compress, "lowrank-jax-compress"),
    ):
        command.set_defaults(run=run)
        command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        command.add_argument(
            "--checkpoint",
            required=True,
            help="variables: .npz, .safetensors, .msgpack, Orbax folder",
        )
        command.add_argument(
            "--model", required=True, help="Linen module by import path, as in package.module:Class"
        )
        command.add_argument(
            "--model-args", type=json.loads, default="{}", help="its attributes as JSON"
        )
        command.add_argument(
            "--images",
            required=True,
            help="unlabelled images (batch, h, w, c): .npy, float or uint8",
        )
        command.add_argument(
            "--mean", type=floats, help="of the channels, subtracted from images scaled to [0, 1]"
        )
        command.add_argument(
            "--std", type=floats, help="of the channels, by which the rest is divided"
        )
        command.add_argument(
            "--budget",
            type=parse_budget,
            default="macs=0.5",
            help="macs, parameters, bytes or latency=share, or a count",
        )
        command.add_argument(
            "--batch", type=int, default=1, help="images that run at once, for a budget of latency"
        )
        command.add_argument(
            "--multiple", type=int, default=1, help="ranks are restricted to multiples of this"
        )
        command.add_argument(
            "--out", type=Path, default=Path(folder), help="folder for the results"
        )
    plan.add_argument(
        "--curve", type=floats, help="shares, such as 0.3,0.5,0.7, to compress to and to draw"
    )
    plan.add_argument(
        "--labels", help="classes of the images, .npy: the curve is of accuracy, not of agreement"
    )
    compress.add_argument(
        "--plan", type=Path, help="plan.json of an earlier run, instead of a budget"
    )
    compress.add_argument(
        "--sweeps", type=int, default=1, help="alternating refinements of the factors"
    )


def floats(text: str) -> list[float]:
    """ "0.5,0.5,0.5" as numbers, for argparse."""
    return [float(part) for part in text.split(",")]


def parse_budget(text: str) -> dict[str, int | float]:
    """ "macs=0.5" as the budget of `plan`, for argparse."""
    name, _, amount = text.partition("=")
    try:
        value = float(amount) if "." in amount or "e" in amount else int(amount)
    except ValueError:
        name = ""
    if name not in ("macs", "parameters", "bytes", "latency"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no budget such as macs=0.5, parameters=200000 or latency=0.6"
        )
    return {name: value}


def run_plan(args: argparse.Namespace) -> None:
    """Writes a plan and its table, and the curve if shares are given."""
    from lowrank_jax.planning.planner import plan
    from lowrank_jax.report import journey as report

    apply, variables, images = load_job(args)
    labels = load_labels(args.labels, len(images)) if args.labels else None
    chosen = plan(apply, variables, images, **args.budget, batch=args.batch, multiple=args.multiple)
    points = curve(apply, variables, images, args, labels) if args.curve else []
    with report.whole_folder(args.out) as folder:
        _write(
            folder,
            chosen,
            {"command": "lowrank-jax plan", "curve": [(p.total(m)[1], y) for p, y, m in points]},
        )
        if points:
            _draw(points, labels is not None).savefig(folder / "curve.png", dpi=120)
    print(f"{chosen}\nThe plan is in {args.out / 'plan.json'}")


def curve(
    apply: Callable, variables: Any, images: np.ndarray, args: argparse.Namespace, labels: Any
) -> list[tuple]:
    """For each share the plan, the share of images that the compressed network classifies as
    wanted, the measure.

    Wanted are the labels, or what the dense network says.
    """
    from lowrank_jax.compression.compressing import compress
    from lowrank_jax.planning.planner import plan
    from lowrank_jax.program.apply import lowrank

    [name] = args.budget
    wanted = classes(apply, variables, images) if labels is None else labels
    points = []
    for share in args.curve:
        planned = plan(
            apply, variables, images, **{name: share}, batch=args.batch, multiple=args.multiple
        )
        small = compress(apply, variables, images, planned.ranks) if planned.ranks else variables
        found = float(np.mean(classes(lowrank(apply), small, images) == wanted))
        print(f"{name}={share}: {found:.2%}", flush=True)
        points.append((planned, found, planned.budget.measure if planned.budget else "macs"))
    return points


def classes(apply: Callable, variables: Any, images: np.ndarray, batch: int = 256) -> np.ndarray:
    """The class of the largest output of each image."""
    import jax

    from lowrank_jax.program.compiler import default_options

    classify = lambda variables, images: apply(variables, images).argmax(-1)  # noqa: E731
    run = jax.jit(classify, compiler_options=default_options())
    return np.concatenate(
        [run(variables, images[i : i + batch]) for i in range(0, len(images), batch)]
    )


def _draw(points: list[tuple], accuracy: bool) -> Any:
    from lowrank_jax.planning.curves import draw_curve

    figure = draw_curve({"compressed": [(plan, y) for plan, y, _ in points]}, measure=points[0][2])
    if not accuracy:
        figure.axes[0].set_ylabel("images classified as by the dense network, %")
    return figure


def run_compress(args: argparse.Namespace) -> None:
    """Writes the compressed checkpoint with its plan and a report."""
    from lowrank_jax.compression.compressing import compress
    from lowrank_jax.io.weights import save_weights
    from lowrank_jax.planning.planner import plan
    from lowrank_jax.planning.plans import Plan
    from lowrank_jax.report import journey as report

    apply, variables, images = load_job(args)
    start = time.perf_counter()
    planned = Plan.load(args.plan) if args.plan else None
    chosen = planned or plan(
        apply, variables, images, **args.budget, batch=args.batch, multiple=args.multiple
    )
    small = compress(apply, variables, images, chosen.ranks, sweeps=args.sweeps)
    seconds = time.perf_counter() - start
    error = output_error(apply, variables, small, images)
    with report.whole_folder(args.out) as folder:
        save_weights(folder / "variables.npz", small)
        _write(
            folder,
            chosen,
            {"command": "lowrank-jax compress", "seconds": seconds, "output_error": error},
        )
    print(
        f"{chosen}\nRelative error of the outputs on the images given: {error:.4f}; took {seconds:.0f} s"
    )
    print(
        f"The compressed checkpoint is in {args.out / 'variables.npz'}; run it with lowrank(model.apply)"
    )


def output_error(
    apply: Callable, variables: Any, small: Any, images: np.ndarray, batch: int = 256
) -> float:
    """Norm of the difference of the networks' outputs over the norm of the dense network's."""
    import jax

    from lowrank_jax.program.apply import lowrank
    from lowrank_jax.program.compiler import default_options

    dense, low = (jax.jit(f, compiler_options=default_options()) for f in (apply, lowrank(apply)))
    gap = norm = 0.0
    for start in range(0, len(images), batch):
        wanted, found = (
            np.asarray(f(v, images[start : start + batch]), np.float64)
            for f, v in ((dense, variables), (low, small))
        )
        gap, norm = gap + float(np.sum((found - wanted) ** 2)), norm + float(np.sum(wanted**2))
    return (gap / norm) ** 0.5 if norm else 0.0


def load_job(args: argparse.Namespace) -> tuple[Callable, dict[str, Any], np.ndarray]:
    """The model's apply, the variables and the images that the options name."""
    import jax

    from lowrank_jax.io.weights import load_weights

    model = load_model(args.model, args.model_args)
    variables = jax.tree.map(jax.numpy.asarray, load_weights(args.checkpoint))
    if "params" not in variables:
        raise ValueError(
            f"{args.checkpoint} holds {sorted(variables)}, not 'params': save the variables of the model."
        )
    images = load_images(args.images, args.mean, args.std)
    expected = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), images[:1])
    if jax.tree.map(np.shape, dict(variables)) != jax.tree.map(np.shape, dict(expected)):
        raise ValueError(
            f"{args.checkpoint} does not hold the variables of {args.model} for images {images.shape[1:]}."
        )
    return model.apply, variables, images


def load_model(path: str, attributes: dict[str, Any]) -> Any:
    """A Linen module by "package.module:Class"."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"--model {path!r} is no import path such as package.module:Class.")
    found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ValueError(f"--model {path!r}: {module} has no {name!r}.")
    try:
        return getattr(found, name)(**attributes)
    except TypeError as error:
        raise ValueError(
            f"--model {path} with --model-args {json.dumps(attributes)}: {error}"
        ) from error


def load_images(path: str, mean: list[float] | None, std: list[float] | None) -> np.ndarray:
    """Images of a .npy file as float32; uint8 is scaled to [0, 1]."""
    images = np.load(path, allow_pickle=False)
    if not isinstance(images, np.ndarray) or images.ndim < 3 or not len(images):
        raise ValueError(
            f"{path} is no array of images (batch, ..., channels) as numpy.save writes it."
        )
    scaled = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, images.shape[-1]):
            raise ValueError(f"--{name} has {len(values)} values for {images.shape[-1]} channels.")
    shift, scale = (np.asarray(value, np.float32) for value in (mean or 0, std or 1))
    return (scaled - shift) / scale


def load_labels(path: str, count: int) -> np.ndarray:
    """The classes of a .npy file, one for each image."""
    labels = np.load(path, allow_pickle=False)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path} holds {labels.dtype} of shape {labels.shape}, not one int for each of {count} images."
        )
    return labels


def _write(folder: Path, chosen: Any, facts: dict[str, Any]) -> None:
    from lowrank_jax.training.experiment import machine

    chosen.save(folder / "plan.json")
    (folder / "report.md").write_text(f"# {facts['command']}\n\n```\n{chosen}\n```\n")
    totals = {measure: chosen.total(measure) for measure in ("parameters", "macs", "bytes")}
    (folder / "report.json").write_text(
        json.dumps({**facts, **totals, "machine": machine()}, indent=1) + "\n"
    )
