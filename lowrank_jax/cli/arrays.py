"""Arrays of the user's own, in .npy and .npz files and in batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax.io import npz
from lowrank_jax.io.missing import check_exists

IMAGES = ("images", "image", "x")  # names of the images in a file or a batch
LABELS = ("labels", "label", "y")


def load_array(path: str, names: Sequence[str], what: str) -> np.ndarray:
    """The array of a .npy file, or the array of one of some names in a .npz file.

    Args:
        path: of the file.
        names: of the entry of a .npz file; a file that holds a single array needs none of them.
        what: what the array is to be, for the messages.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no such file, or it has no such entry.
    """
    check_exists(path, f"give {what}, as numpy.save writes them")
    if Path(path).suffix.lower() == ".npz":
        arrays = load_entries(path, what)
        return next(iter(arrays.values())) if len(arrays) == 1 else entry(arrays, names, path)
    try:
        with Path(path).open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # damaged bytes make numpy raise whatever it meets
        raise _damaged(path, ".npy", what, error) from error


def load_entries(path: str, what: str) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by their names.

    Raises:
        ValueError: it is no such file.
    """
    try:
        return npz.read_arrays(Path(path))
    except ValueError as error:
        raise _damaged(path, ".npz", what, error) from error


def _damaged(path: str, suffix: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is no {suffix} file of numbers ({str(error)[:100]}); give {what}, as numpy.save "
        "writes them."
    )


def entry(given: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The entry that has one of some names.

    Raises:
        ValueError: there is none.

    Example:
        >>> entry({"image": 3, "label": 4}, LABELS, "a batch")
        4
    """
    found = next((name for name in names if name in given), None)
    if found is None:
        raise ValueError(f"{where} has {sorted(given)}; name one of them {' or '.join(names)}.")
    return given[found]


def pair_of(given: Any, where: str) -> tuple[Any, Any]:
    """The images of a batch or a file, and its labels or None.

    Args:
        given: images, a tuple or list (images, labels), or a mapping with the names of both.
        where: what it is, for the messages.

    Example:
        >>> pair_of((3, 4), "a batch"), pair_of({"x": 3}, "a batch"), pair_of(3, "a batch")
        ((3, 4), (3, None), (3, None))
    """
    if isinstance(given, Mapping):
        labelled = any(name in given for name in LABELS)
        return entry(given, IMAGES, where), entry(given, LABELS, where) if labelled else None
    if isinstance(given, tuple | list):
        if len(given) not in (1, 2):
            raise ValueError(f"{where} has {len(given)} parts; give images, or images and labels.")
        return given[0], given[1] if len(given) == 2 else None
    return given, None
