"""Metrics of a run: lines of JSON in its folder, and TensorBoard where a writer is installed."""

import importlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax.io.atomic import whole_file

FILE = "metrics.jsonl"
RISE = 1.5  # more than the batches differ
Write = Callable[[int, Mapping[str, float]], None]


class Metrics:
    """The metrics of one run.

    Args:
        folder: of the run.
        step: at which the run begins or goes on; lines of later steps are removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     metrics = Metrics(folder, step=0)
        ...     metrics.write(10, {"loss": 0.5})
        ...     read_metrics(folder)
        [{'step': 10, 'loss': 0.5}]
    """

    def __init__(self, folder: str | os.PathLike, step: int = 0) -> None:
        self.path = Path(folder) / FILE
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        with whole_file(self.path) as scratch:
            scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._board = _tensorboard(Path(folder) / "tensorboard")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line, which is in the file when the call returns."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self._board(step, values)


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run, each a dict with its "step"; a line that is damaged is left out."""
    path = Path(folder) / FILE
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict) and type(line.get("step")) is int]


def risen(first: float, last: float) -> bool:
    """Whether a loss, which may be negative, is clearly above what it was.

    Example:
        >>> risen(1.0, 2.0), risen(1.0, 1.2), risen(-2.0, -3.0)
        (True, False, False)
    """
    return last - first > (RISE - 1) * abs(first)


def numbers(found: Any) -> dict[str, float]:
    """What `after_epoch` returned, as plain numbers.

    Raises:
        ValueError: it is no mapping of names to numbers, or has a name that is taken.
    """
    try:
        given = {} if found is None else dict(found)
        plain = {str(name): float(value) for name, value in given.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"after_epoch returned {found!r:.80}; give back a mapping of names to numbers, such as "
            '{"accuracy": 0.9}, or None.'
        ) from error
    if taken := plain.keys() & {"step", "epoch"}:
        raise ValueError(
            f"after_epoch returned {min(taken)!r}, which every line of the metrics has of its own; "
            "give it another name."
        )
    return plain


def floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a step as plain numbers."""
    return {name: float(value) for name, value in metrics.items() if name != "not_finite"}


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric; there are none of no steps."""
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else ())}


def _tensorboard(folder: Path) -> Write:
    """A writer for TensorBoard: of tensorboardX, or of clu, or one that does nothing."""
    for name, make in (("tensorboardX", _of_tensorboardx), ("clu.metric_writers", _of_clu)):
        try:
            return make(importlib.import_module(name), str(folder))
        except ImportError:
            continue
    return lambda step, values: None


def _of_tensorboardx(module: Any, folder: str) -> Write:
    writer = module.SummaryWriter(folder)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write


def _of_clu(module: Any, folder: str) -> Write:
    writer = module.SummaryWriter(folder)

    def write(step: int, values: Mapping[str, float]) -> None:
        writer.write_scalars(step, dict(values))
        writer.flush()

    return write
