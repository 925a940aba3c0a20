"""Options of `finetune` that say how a step is taken, and the arguments that they stand for."""

import argparse
from collections.abc import Callable
from typing import Any

import optax

from lowrank_jax.cli.imports import imported, line
from lowrank_jax.cli.options import inside, positive, rate, share
from lowrank_jax.training.augmentation import Augment, chain, crops_and_flips, cutmix, mixup
from lowrank_jax.training.finetuning import RATE
from lowrank_jax.training.losses import Loss, layer_matching, taught
from lowrank_jax.tuning.algorithms import PAIRS, factors_by

TAUGHT = ("distill", "temperature", "layers")  # options that need a teacher
DISTILL, TEMPERATURE = 0.5, 4.0  # without the options
DTYPES = ("float32", "bfloat16", "float16")


def add_recipe_options(add: Callable) -> None:
    """Adds the options, by the function that adds one to a command."""
    about = "weight of the teacher's probabilities from 0 to 1, the labels have the rest"
    add("--distill", type=share, help=f"{about} (default: {DISTILL:g})")
    about = "of the teacher's probabilities"
    add("--temperature", type=rate, help=f"{about} (default: {TEMPERATURE:g})")
    about = "share of each label that all classes get alike (default: 0)"
    add("--smoothing", type=inside, help=about)
    about = "weight of the squared errors of the decomposed layers' outputs; needs a teacher"
    add("--layers", type=rate, help=about)
    about = "highest of the one-cycle schedule"
    add("--learning-rate", type=rate, help=f"{about} (default: {RATE:g})")
    about = (
        "import path, package.module:name, of an optimiser of optax, or of a function that makes "
        "one of the number of updates; in place of the schedule of --learning-rate"
    )
    add("--optimizer", help=about)
    about = "random crops of the images, padded with zeros by so many pixels, half of them mirrored"
    add("--crop", type=positive, help=about)
    about = "mixes pairs of images and their labels; parameter of the shares, such as 0.2"
    add("--mixup", type=rate, help=about)
    about = "puts a part of one image into another; parameter of the shares, such as 1"
    add("--cutmix", type=rate, help=about)
    about = "decay of a moving average of the parameters, such as 0.999, which is the result"
    add("--average", type=inside, help=about)
    add("--accumulate", type=positive, default=1, help="batches that make one update")
    about = "type of the computation; parameters keep their own"
    add("--dtype", choices=DTYPES, help=about)
    about = "of the factors' two convolutions, such as kn2row+im2col, which may be faster on a CPU"
    add("--algorithms", choices=PAIRS, metavar="FIRST+SECOND", help=about)


def loss_of(args: argparse.Namespace, has_labels: bool, has_teacher: bool) -> Loss:
    """The loss of the options.

    Raises:
        ValueError: there is nothing to learn from, or an option needs what is not there.
    """
    if not (has_labels or has_teacher):
        raise ValueError(
            "There are no labels and no teacher, so there is nothing to learn from; "
            "give --labels, --teacher, or both."
        )
    for name in () if has_teacher else TAUGHT:
        _refuse(args, name, "a teacher; give --teacher or --plan")
    for name in () if has_labels else ("distill", "smoothing"):
        _refuse(args, name, "labels; give --labels")
    own = DISTILL if args.distill is None else args.distill
    weight = 0.0 if not has_teacher else 1.0 if not has_labels else own
    if weight == 0 and has_teacher:
        _refuse(args, "temperature", "a share of the teacher; give --distill above 0")
    if weight == 1 and has_labels:
        _refuse(args, "smoothing", "a share of the labels; give --distill below 1")
    found = taught(weight, args.temperature or TEMPERATURE, args.smoothing or 0.0)
    return found + args.layers * layer_matching() if args.layers else found


def _refuse(args: argparse.Namespace, name: str, needed: str) -> None:
    """Refuses an option that was given where what it needs is not there."""
    value = getattr(args, name)
    if value is not None:
        raise ValueError(f"--{name} {value:g} needs {needed}, or leave --{name} out.")


def step_options(
    args: argparse.Namespace, size: tuple[int, int], classes: int, steps: int
) -> dict[str, Any]:
    """The arguments of `lowrank_jax.finetune` that the options stand for.

    Args:
        args: the options.
        size: height and width of the images.
        classes: of the network.
        steps: of the whole run.
    """
    if args.optimizer and args.learning_rate is not None:
        raise ValueError(
            f"--learning-rate {args.learning_rate:g} is of the schedule that --optimizer "
            f"{args.optimizer} stands in place of; leave one of both out."
        )
    updates = -(-steps // args.accumulate)
    return {
        "learning_rate": args.learning_rate or RATE,
        "tx": _optimizer(args.optimizer, updates) if args.optimizer else None,
        "augment": _augment(args, size, classes),
        "average": args.average,
        "accumulate": args.accumulate,
        "dtype": args.dtype,
        "choose": factors_by(args.algorithms) if args.algorithms else None,
    }


def _optimizer(path: str, updates: int) -> optax.GradientTransformation:
    """The optimiser that an import path names, or that its function makes.

    Raises:
        ValueError: there is none.
    """
    found = imported(path, "--optimizer")
    if found is None:
        module, _, name = path.partition(":")
        raise ValueError(f"--optimizer {path}: {module} has no {name}; give a name that it has.")
    if callable(found):
        try:
            found = found(updates)
        except Exception as error:  # of the user's own code
            raise ValueError(
                f"--optimizer {path} cannot be made; give a function of the number of updates: "
                f"{line(error)}"
            ) from error
    if not isinstance(found, optax.GradientTransformation):
        raise ValueError(
            f"--optimizer {path} gives a {type(found).__name__}; give an optimiser of optax, or a "
            "function that makes one of the number of updates."
        )
    return found


def _augment(args: argparse.Namespace, size: tuple[int, int], classes: int) -> Augment | None:
    """The changes that the options ask for, one after the other."""
    parts = []
    if args.crop:
        parts.append(crops_and_flips(size, args.crop))
    if args.mixup:
        parts.append(mixup(classes, args.mixup))
    if args.cutmix:
        parts.append(cutmix(classes, args.cutmix))
    return chain(*parts) if parts else None
