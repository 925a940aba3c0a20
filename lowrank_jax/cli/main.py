"""The command ``lowrank-jax`` with its subcommands, such as `demo`, `plan` and `compress`."""

import argparse
import logging
import sys
from importlib.metadata import version

from lowrank_jax.cli import (
    completion_command,
    compress_command,
    finetune_command,
    journeys,
    paper_command,
    plan_command,
)
from lowrank_jax.cli.options import OneLine
from lowrank_jax.io.folders import check_folder, check_path

EPILOG = """\
exit status:
  0    done
  2    bad input, which one line of the standard error names; nothing was written
  130  Ctrl-C; a training saved its step before, and the same command goes on
  143  SIGTERM, likewise

Progress and notes are on the standard error; with --quiet after a command only errors are.
Completion in bash: lowrank-jax completion bash > ~/.lowrank-jax.bash, once, and the line
source ~/.lowrank-jax.bash in ~/.bashrc. The argument zsh or tcsh prints the script of that shell.
example:
  lowrank-jax compress --help
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Bad input ends with one line and status 2, Ctrl-C with one line and 130.

    SIGTERM ends a training with status 143, after the step was saved.
    """
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        args.refuse(unknown)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lowrank_jax").setLevel(logging.ERROR if args.quiet else logging.INFO)
    try:
        if "out" in args:
            check = check_path if "goes_on" in args else check_folder
            check(args.out)
        args.run(args)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"lowrank-jax {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        what = str(stop) or "nothing was written"
        print(f"lowrank-jax {args.command}: stopped; {what}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    about = "Low-rank compression of pretrained networks."
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLine(prog="lowrank-jax", description=about, epilog=EPILOG, formatter_class=raw)
    parser.add_argument(
        "--version", action="version", version=f"lowrank-jax {version('lowrank-jax')}"
    )
    names = "{demo,cifar10,plan,compress,finetune,paper,completion}"
    commands = parser.add_subparsers(required=True, dest="command", metavar=names)
    journeys.add_commands(commands)
    plan_command.add_command(commands)
    compress_command.add_command(commands)
    finetune_command.add_command(commands)
    paper_command.add_command(commands)
    completion_command.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
