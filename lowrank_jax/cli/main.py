"""The command ``lowrank-jax``: `demo`, `cifar10`, `plan`, `compress`, `finetune` and `paper`."""

import argparse
import logging
import sys

from lowrank_jax.cli import (
    compress_command,
    finetune_command,
    journeys,
    paper_command,
    plan_command,
)
from lowrank_jax.io.folders import check_folder


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Bad input ends with one line and status 2, Ctrl-C with one line and 130.

    SIGTERM ends a training with status 143, after the step was saved.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lowrank_jax").setLevel(logging.INFO)
    args = build_parser().parse_args(argv)
    try:
        if "out" in args:
            check_folder(args.out)
        args.run(args)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"lowrank-jax {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        what = str(stop) or "nothing was written"
        print(f"lowrank-jax {args.command}: stopped; {what}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    about = "Low-rank compression of pretrained networks."
    parser = argparse.ArgumentParser(prog="lowrank-jax", description=about)
    names = "{demo,cifar10,plan,compress,finetune,paper}"
    commands = parser.add_subparsers(required=True, dest="command", metavar=names)
    journeys.add_commands(commands)
    plan_command.add_command(commands)
    compress_command.add_command(commands)
    finetune_command.add_command(commands)
    paper_command.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
