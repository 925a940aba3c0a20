"""Images of an iterator of the user's own, by its import path."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lowrank_jax.cli.arrays import pair_of
from lowrank_jax.cli.choice import Choice, Examples
from lowrank_jax.cli.imports import imported, line

HELP = "give the import path of an iterator of batches, or of a function that gives one"
Batch = tuple[np.ndarray, np.ndarray | None]


def read_stream(path: str, choice: Choice) -> Examples:
    """The first images of an iterator of batches.

    A batch is images, (images, labels), or a mapping that names both.

    Args:
        path: "package.module:name" of an iterable, or of a function without arguments that gives
            one.
        choice: how many; an iterator without an end needs a number.

    Raises:
        ValueError: it cannot be imported, raises, or gives something else.
    """
    choice.refuse_size(path)
    batches = list(_taken(path, choice.count))
    if not batches:
        raise ValueError(f"--images {path} gives no batches; {HELP}.")
    images = _joined([own for own, _ in batches], path)[: choice.count]
    labels = [own for _, own in batches if own is not None]
    if labels and len(labels) < len(batches):
        raise ValueError(f"--images {path}: some batches have no labels; give all or none.")
    known = _joined(labels, path)[: choice.count] if labels else None
    if known is not None and len(known) != len(images):
        raise ValueError(
            f"--images {path}: {len(images)} images have {len(known)} labels; give one for each."
        )
    count = len(images)
    return Examples(images=images, labels=known, rows=np.arange(count), total=count)


def _taken(path: str, count: int | None) -> Iterator[Batch]:
    """The batches until there are enough images."""
    images = 0
    for number, batch in enumerate(_batches(path)):
        where = f"--images {path}: batch {number}"
        own, labels = (None if x is None else _array(x, where) for x in pair_of(batch, where))
        if own is None or own.ndim < 3:
            shape = None if own is None else own.shape
            raise ValueError(f"{where} has the shape {shape}; give images (batch, ..., channels).")
        yield own, labels
        images += len(own)
        if count is not None and images >= count:
            return


def _batches(path: str) -> Iterator[Any]:
    found = imported(path, "--images")
    try:
        given = found() if callable(found) else found
        yield from given
    except Exception as error:  # of the user's own code
        raise ValueError(f"--images {path} cannot be read; {HELP}: {line(error)}") from error


def _array(value: Any, where: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiubV" or not array.ndim:
        raise ValueError(f"{where} holds a {type(value).__name__}; give arrays of numbers.")
    return array


def _joined(parts: list[np.ndarray], path: str) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            f"--images {path} has images of shapes {shapes}; give images of one shape."
        )
    return np.concatenate(parts)
