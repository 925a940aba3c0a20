"""The command ``lowrank-jax``: `demo`, `cifar10`, `plan` and `compress`."""

import argparse
import sys
import time
from pathlib import Path

from lowrank_jax.cli.checkpoints import add_commands


def main(argv: list[str] | None = None) -> int:
    """Runs a command; bad input ends with one line on standard error and status 2."""
    args = build_parser().parse_args(argv)
    from lowrank_jax.report import (
        journey as report,
    )  # after the options are read, so that --help is quick

    try:
        report.check_out(args.out)
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"lowrank-jax {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="lowrank-jax", description="Low-rank compression of Flax networks."
    )
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="{demo,cifar10,plan,compress}"
    )
    about = "decompose, fine-tune and measure the embedded network on the embedded CIFAR-10 sample"
    demo = commands.add_parser("demo", help=about, description=about)
    about = "train on CIFAR-10 from TensorFlow Datasets, decompose, fine-tune and measure"
    cifar = commands.add_parser("cifar10", help=about, description=about)
    for command, run, folder in (
        (demo, run_demo, "lowrank-jax-demo"),
        (cifar, run_cifar10, "lowrank-jax-cifar10"),
    ):
        command.set_defaults(run=run)
        command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
        command.add_argument("--out", type=Path, default=Path(folder), help="folder for the report")
        command.add_argument(
            "--ranks", type=parse_ranks, default="Conv_0=10,Conv_2=20", help="layer=rank,..."
        )
        command.add_argument(
            "--finetune-epochs", type=positive, default=5, help="epochs after the decomposition"
        )
        command.add_argument(
            "--precision",
            choices=("float32", "bfloat16"),
            default="float32",
            help="of the computation",
        )
        command.add_argument(
            "--distill",
            action="store_true",
            help="fine-tune towards the dense network's probabilities",
        )
        command.add_argument(
            "--seed", type=int, default=0, help="of initialisation, augmentation and shuffling"
        )
    _add_training_options(cifar)
    add_commands(commands)
    return parser


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        help="folder that holds cifar10/; default: TFDS_DATA_DIR, ~/tensorflow_datasets",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="dense .npz of an earlier run to start from, instead of random weights",
    )
    parser.add_argument(
        "--epochs", type=int, help="epochs of training the dense network; 30, or 0 with --weights"
    )
    parser.add_argument("--batch-size", type=positive, default=128, help="images in a step")
    parser.add_argument(
        "--learning-rate", type=float, default=0.1, help="highest rate of the one-cycle schedule"
    )
    parser.add_argument(
        "--finetune-learning-rate", type=float, default=0.02, help="the same, in the fine-tuning"
    )
    parser.add_argument(
        "--crop", type=positive, default=32, help="side of the random training crops, pixels"
    )
    parser.add_argument(
        "--padding", type=int, default=4, help="zeros around an image before the crop, pixels"
    )


def positive(text: str) -> int:
    """An int of at least 1, for argparse."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give an int of at least 1")
    return value


def parse_ranks(text: str) -> dict[str, int]:
    """ "Conv_0=10,Conv_2=20" as a table of ranks, for argparse."""
    try:
        return {path: int(rank) for path, rank in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not layer=rank,... as in Conv_0=10,Conv_2=20"
        ) from error


def run_demo(args: argparse.Namespace) -> None:
    """The whole journey on what the package carries."""
    from lowrank_jax import data
    from lowrank_jax.training import experiment

    start = time.perf_counter()
    variables = data.pretrained()
    options = dict(batch_size=50, crop=24, padding=0, seed=args.seed, distill=args.distill)
    recipe = experiment.Recipe(args.finetune_epochs, peak=0.01, **options)
    _journey(args, variables, data.sample("train"), data.sample("test"), recipe, "lowrank-jax demo")
    print(f"Took {time.perf_counter() - start:.0f} s; a report with pictures is in {args.out}")


def run_cifar10(args: argparse.Namespace) -> None:
    """The whole experiment."""
    from lowrank_jax import data
    from lowrank_jax.io import weights as checkpoint
    from lowrank_jax.training import experiment

    early = args.out.with_name(
        f"{args.out.name}-dense.npz"
    )  # hours of work, kept should a later step fail
    train, test = (data.cifar10(split, args.data_dir) for split in ("train", "test"))
    options = dict(batch_size=args.batch_size, crop=args.crop, padding=args.padding, seed=args.seed)
    model = _model(args)
    variables = (
        experiment.load(model, args.weights) if args.weights else experiment.init(model, args.seed)
    )
    experiment.check_ranks(variables, args.ranks)
    epochs = args.epochs if args.epochs is not None else 0 if args.weights else 30
    if epochs > 0:
        recipe = experiment.Recipe(epochs, args.learning_rate, **options)
        variables, _ = experiment.fit(model, variables, train, test, recipe)
        checkpoint.save_weights(early, variables)
        print(f"The trained network is in {early} until the report is complete")
    recipe = experiment.Recipe(
        args.finetune_epochs, args.finetune_learning_rate, distill=args.distill, **options
    )
    _journey(args, variables, train, test, recipe, "lowrank-jax cifar10")
    early.unlink(missing_ok=True)
    print(f"A report with pictures and both networks is in {args.out}")


def _model(args: argparse.Namespace):
    from lowrank_jax.models import NIN

    return NIN(dtype=None if args.precision == "float32" else args.precision)


def _journey(args: argparse.Namespace, variables, train, test, recipe, title: str) -> None:
    from lowrank_jax.io import weights as checkpoint
    from lowrank_jax.report import journey as report
    from lowrank_jax.training import experiment

    journey = experiment.run(_model(args), variables, args.ranks, train, test, recipe)
    with report.whole_folder(args.out) as folder:
        report.write_report(folder, journey, title)
        checkpoint.save_weights(folder / "dense.npz", variables)
    print(f"\n{report.markdown(journey)}\n")


if __name__ == "__main__":
    sys.exit(main())
