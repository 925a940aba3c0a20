"""The command `completion`: a script with which a shell completes commands and options."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_jax.cli.options import new_command

SHELLS = ("bash", "zsh", "tcsh")
FILES = {"checkpoint", "images", "labels", "plan", "teacher", "weights"}  # options that take paths


def add_command(commands: Any) -> None:
    """Adds `completion` to the subcommands of ``lowrank-jax``."""
    about = "print a script that completes commands and options in a shell (needs shtab)"
    command = new_command(commands, "completion", about, run)
    command.add_argument("shell", choices=SHELLS, help="that is to complete")


def run(args: argparse.Namespace) -> None:
    """Prints the script."""
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            "Completion needs shtab: pip install 'lowrank-jax[completion]'."
        ) from error
    from lowrank_jax.cli.main import build_parser  # which knows this command, too

    parser = build_parser()
    for action in _actions(parser):
        if action.dest in FILES or action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell=args.shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
