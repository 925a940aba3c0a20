"""Values of options on the command line, for argparse."""

import argparse
import difflib
import functools
import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

Number = TypeVar("Number", int, float)
NETWORK = "--checkpoint net.npz --model package.module:Net --images images.npy"
EXAMPLES = {
    "demo": "lowrank-jax demo --out report",
    "cifar10": "lowrank-jax cifar10 --data-dir ~/tensorflow_datasets",
    "plan": f"lowrank-jax plan {NETWORK} --budget macs=0.5",
    "compress": f"lowrank-jax compress {NETWORK} --budget macs=0.5",
    "finetune": f"lowrank-jax finetune {NETWORK} --labels labels.npy --epochs 10",
    "paper": "lowrank-jax paper --networks VGG-16",
    "completion": "lowrank-jax completion bash > ~/.lowrank-jax.bash",
}
DATA_DIR = "folder that holds {}; default: TFDS_DATA_DIR, ~/tensorflow_datasets"
MEASURES = ("macs", "parameters", "bytes", "latency")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of ints within limits.

    Example:
        >>> whole(1)("12")
        12
    """
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        value = _as(int, text, f"an int {allowed}")
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give an int {allowed}")
        return value

    return parse


positive, seed = whole(1), whole(0, 2**32 - 1)


def rate(text: str) -> float:
    """A positive finite number."""
    value = _as(float, text, "a positive number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give a positive number")
    return value


def share(text: str) -> float:
    """A number from 0 to 1.

    Example:
        >>> share("0.5")
        0.5
    """
    value = _as(float, text, "a number from 0 to 1")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give a number from 0 to 1")
    return value


def inside(text: str) -> float:
    """A number above 0 and below 1.

    Example:
        >>> inside("0.999")
        0.999
    """
    value = share(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(
            f"{text} is not allowed; give a number above 0 and below 1"
        )
    return value


def floats(text: str) -> list[float]:
    """Finite numbers with commas between them.

    Example:
        >>> floats("0.5,0.25")
        [0.5, 0.25]
    """
    values = [_as(float, part, "numbers such as 0.5,0.25") for part in text.split(",")]
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give finite numbers")
    return values


def rates(text: str) -> list[float]:
    """Positive finite numbers with commas between them."""
    return [rate(part) for part in text.split(",")]


def shares(text: str) -> list[float]:
    """Numbers above 0 and up to 1 with commas between them."""
    values = floats(text)
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give shares above 0 and up to 1")
    return values


def _as(kind: Callable[[str], Number], text: str, wanted: str) -> Number:
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give {wanted}") from error


def image_size(text: str) -> tuple[int, int]:
    """The height and the width of images.

    Example:
        >>> image_size("224"), image_size("224x320")
        ((224, 224), (224, 320))
    """
    sides = [positive(side) for side in text.split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; give one or two, as in 224x320")
    return sides[0], sides[-1]


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
            f"{text!r} is not allowed; give layer=rank,... as in Conv_0=10,Conv_2=20"
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
            f"{text!r} is no budget; give one such as macs=0.5, parameters=200000, bytes=0.5 or "
            "latency=0.6"
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
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f'{text!r} is no JSON object; give one such as {{"train": false}}'
        )
    return found


def _refuse(command: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """Ends a command that was given what it does not know, with the nearest of its options."""
    known = re.findall(r"--[a-z-]+", command.format_help())
    near = difflib.get_close_matches(unknown[0], known, n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    command.error(f"{unknown[0]} is not known{advice}")


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of the commands are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help shows all options\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults where there are any, and keeps the lines of the example."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == []
        return action.help if none else super()._get_help_string(action)


def new_command(commands: Any, name: str, about: str, run: Callable) -> argparse.ArgumentParser:
    """A subcommand that shows its defaults and an example, and calls ``run``."""
    epilog = f"example:\n  {EXAMPLES[name]}"
    wrapped = textwrap.fill(about, 80)
    command = commands.add_parser(name, help=about, description=wrapped, epilog=epilog)
    command.set_defaults(run=run, refuse=functools.partial(_refuse, command))
    command.formatter_class = _Help
    about = "print errors only, no progress and no notes"
    command.add_argument("--quiet", action="store_true", help=about)
    return command
