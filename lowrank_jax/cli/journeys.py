"""The commands `demo` and `cifar10`: the whole journey, from a dense network to a report."""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from lowrank_jax import data
from lowrank_jax.cli.options import (
    DATA_DIR,
    new_command,
    parse_ranks,
    positive,
    rate,
    seed,
    share,
    whole,
)
from lowrank_jax.experiments import cifar10 as experiment
from lowrank_jax.experiments import journey as journeys
from lowrank_jax.io.folders import whole_folder
from lowrank_jax.io.weights import save_weights
from lowrank_jax.models import NIN
from lowrank_jax.report.journey import journey_report, markdown
from lowrank_jax.report.writing import write_report


def add_commands(commands: Any) -> None:
    """Adds `demo` and `cifar10` to the subcommands of ``lowrank-jax``."""
    about = "compress, tune and measure the embedded network on the embedded CIFAR-10 sample"
    demo = new_command(commands, "demo", about, run_demo)
    _add_options(demo, "lowrank-jax-demo", epochs=1)
    about = "train on CIFAR-10 from TensorFlow Datasets, compress, tune and measure"
    cifar10 = new_command(commands, "cifar10", about, run_cifar10)
    _add_options(cifar10, "lowrank-jax-cifar10", epochs=5)
    _add_training_options(cifar10)


def _add_options(command: argparse.ArgumentParser, folder: str, epochs: int) -> None:
    add = command.add_argument
    add("--out", type=Path, default=Path(folder), help="folder for the report")
    add("--ranks", type=parse_ranks, default="Conv_0=10,Conv_2=20", help="layer=rank,...")
    add("--finetune-epochs", type=positive, default=epochs, help="epochs after the decomposition")
    types = ("float32", "bfloat16")
    add("--precision", choices=types, default="float32", help="of the computation")
    add("--seed", type=seed, default=0, help="of initialisation, augmentation and shuffling")


def _add_training_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--data-dir", help=DATA_DIR.format("cifar10/"))
    about = "dense .npz of an earlier run to start from, instead of random weights"
    add("--weights", type=Path, help=about)
    about = "epochs of training the dense network; 30, or 0 with --weights"
    add("--epochs", type=whole(0), help=about)
    add("--batch-size", type=positive, default=128, help="images in a step")
    about = "highest rate of the one-cycle schedule"
    add("--learning-rate", type=rate, default=0.1, help=about)
    about = "highest rate of the fine-tuning"
    add("--finetune-learning-rate", type=rate, default=0.02, help=about)
    add("--crop", type=whole(1, 32), default=32, help="side of the random training crops, pixels")
    about = "weight of the dense network's probabilities from 0 to 1; the labels have the rest"
    add("--distill", type=share, default=0.5, help=about)
    add("--padding", type=whole(0), default=4, help="zeros around an image before the crop, pixels")


def run_demo(args: argparse.Namespace) -> None:
    """The whole journey on what the package carries."""
    start = time.perf_counter()
    recipe = experiment.Recipe(
        args.finetune_epochs,
        peak=0.001,
        batch_size=50,
        crop=20,
        padding=0,
        seed=args.seed,
        distill=1.0,
    )
    variables = data.pretrained()
    experiment.check_ranks(variables, args.ranks)
    _run(args, variables, data.sample("train"), data.sample("test"), recipe)
    print(f"Took {time.perf_counter() - start:.0f} s; the report is {args.out / 'report.html'}")


def run_cifar10(args: argparse.Namespace) -> None:
    """The whole experiment; the same command goes on where it was stopped."""
    recipe, work = _dense_recipe(args), args.out.with_name(f"{args.out.name}-training")
    train, test = (data.cifar10(split, args.data_dir) for split in ("train", "test"))
    model = _model(args)
    variables = (
        experiment.load(model, args.weights) if args.weights else experiment.init(model, args.seed)
    )
    experiment.check_ranks(variables, args.ranks)
    if recipe:
        variables, _ = experiment.fit(model, variables, train, test, recipe, folder=work / "dense")
    options = dict(distill=args.distill, **_training(args))
    tuning = experiment.Recipe(args.finetune_epochs, args.finetune_learning_rate, **options)
    _run(args, variables, train, test, tuning, work / "fine-tuning")
    shutil.rmtree(work, ignore_errors=True)
    print(f"Both networks are in {args.out}, and the report is report.html there")


def _dense_recipe(args: argparse.Namespace) -> experiment.Recipe | None:
    """How the dense network is trained; None if it is not."""
    usual = 0 if args.weights else 30
    epochs = usual if args.epochs is None else args.epochs
    if epochs <= 0:
        return None
    return experiment.Recipe(epochs, args.learning_rate, **_training(args))


def _training(args: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "crop", "padding", "seed")
    return {name: getattr(args, name) for name in names}


def _model(args: argparse.Namespace) -> NIN:
    return NIN(dtype=None if args.precision == "float32" else args.precision)


def _run(
    args: argparse.Namespace,
    variables: experiment.Variables,
    train: data.Dataset,
    test: data.Dataset,
    recipe: experiment.Recipe,
    work: Path | None = None,
) -> None:
    given = (_model(args), variables, args.ranks, train, test, recipe)
    journey = journeys.run(*given, tune_planned=work is not None, folder=work)
    with whole_folder(args.out) as folder:
        save_weights(folder / "lowrank.npz", journey.result.variables)
        save_weights(folder / "dense.npz", variables)
        write_report(folder, journey_report(journey, f"lowrank-jax {args.command}", args.out))
    print(f"\n{markdown(journey)}\n")
