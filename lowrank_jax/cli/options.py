"""Values of options on the command line, for argparse."""

import argparse
import json
from collections.abc import Callable
from typing import Any

MEASURES = ("macs", "parameters", "bytes", "latency")


def positive(text: str) -> int:
    """An int of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give an int of at least 1")
    return value


def floats(text: str) -> list[float]:
    """Numbers with commas between them.

    Example:
        >>> floats("0.5,0.25")
        [0.5, 0.25]
    """
    return [float(part) for part in text.split(",")]


def parse_ranks(text: str) -> dict[str, int]:
    """A table of ranks.

    Example:
        >>> parse_ranks("Conv_0=10,Conv_2=20")
        {'Conv_0': 10, 'Conv_2': 20}
    """
    try:
        return {path: int(rank) for path, rank in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not layer=rank,... as in Conv_0=10,Conv_2=20"
        ) from error


def parse_budget(text: str) -> dict[str, int | float]:
    """The budget that `lowrank_jax.plan` takes.

    Example:
        >>> parse_budget("macs=0.5"), parse_budget("bytes=200000")
        ({'macs': 0.5}, {'bytes': 200000})
    """
    name, _, amount = text.partition("=")
    try:
        value = float(amount) if "." in amount or "e" in amount else int(amount)
    except ValueError:
        name = ""
    if name not in MEASURES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no budget such as macs=0.5, parameters=200000, bytes=0.5 or latency=0.6"
        )
    return {name: value}


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object.

    Example:
        >>> parse_object('{"train": false}')
        {'train': False}
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"train": false}}')
    return found


def new_command(commands: Any, name: str, about: str, run: Callable) -> argparse.ArgumentParser:
    """A subcommand that shows its defaults and calls ``run``."""
    command = commands.add_parser(name, help=about, description=about)
    command.set_defaults(run=run)
    command.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return command
