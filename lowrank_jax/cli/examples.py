"""Images and labels of the user's own, wherever they are: what `--images` and `--labels` take."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from lowrank_jax.cli.arrays import IMAGES, LABELS, load_array, load_entries, pair_of
from lowrank_jax.cli.choice import Choice, Examples
from lowrank_jax.cli.pictures import read_pictures
from lowrank_jax.cli.prepared import PREFIX, read_folder, read_named
from lowrank_jax.cli.streams import read_stream
from lowrank_jax.io.missing import check_exists

WANTED = "images (batch, ..., channels)"
KINDS = "give a .npy or .npz file, a folder of pictures, tfds:name/split or package.module:name"
IMPORTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_examples(path: str, choice: Choice) -> Examples:
    """Images as they are stored, of the kind that the path tells.

    Args:
        path: a .npy or .npz file, a folder of pictures, a folder with files of array_record,
            "tfds:name/split", or "package.module:function", which gives batches.
        choice: which of them.

    Raises:
        ImportError: the package that reads them is not installed.
        OSError: there is nothing at the path, or a file cannot be read.
        ValueError: it holds something else.
    """
    if path.startswith(PREFIX):
        return read_named(path.removeprefix(PREFIX), choice)
    place = Path(path)
    if place.is_dir():
        prepared = any(place.glob("*.array_record*"))
        return read_folder(place, choice) if prepared else read_pictures(place, choice)
    if IMPORTED.fullmatch(path) and not place.exists():
        return read_stream(path, choice)
    check_exists(path, KINDS, "file or folder")
    return _of_file(path, choice)


def _of_file(path: str, choice: Choice) -> Examples:
    choice.refuse_size(path)
    images, labels = _arrays(path)
    if not images.ndim or (labels is not None and labels.shape[:1] != images.shape[:1]):
        shapes = [x.shape for x in (images, labels) if x is not None]
        raise ValueError(f"{path} holds arrays {shapes}; give images and a label for each.")
    return choice.of_arrays(images, labels)


def _arrays(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The images of a file, and the labels that a .npz file may have beside them."""
    if Path(path).suffix.lower() == ".npz":
        arrays = load_entries(path, WANTED)
        one = next(iter(arrays.values())) if len(arrays) == 1 else None
        return pair_of(arrays, path) if one is None else (one, None)
    return load_array(path, IMAGES, WANTED), None


def scaled(
    images: np.ndarray, path: str, mean: list[float] | None, std: list[float] | None
) -> np.ndarray:
    """Images (batch, ..., channels) as float32; uint8 is scaled to [0, 1].

    Args:
        images: as they are stored.
        path: where they are from.
        mean, std: of the channels, or one for all; the mean is subtracted, then the rest is
            divided.

    Raises:
        ValueError: they are no images, or of another type.
    """
    if images.ndim < 3 or not images.size:
        raise ValueError(f"{path} holds an array {images.shape}; give {WANTED}.")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"{path} holds images of type {images.dtype}; give uint8 from 0 to 255, or floats as "
            "the network takes them."
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, images.shape[-1]):
            raise ValueError(
                f"--{name} has {len(values)} values for {images.shape[-1]} channels; give as many, "
                "or one."
            )
    if mean is not None and images.dtype == np.uint8 and max(map(abs, mean)) > 1:
        raise ValueError(
            f"--mean {','.join(f'{value:g}' for value in mean)} is not allowed for uint8 images, "
            "which are scaled to [0, 1] first; give means of that scale, such as 0.5, and --std, "
            "too."
        )
    floats = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    shift, scale = (np.asarray(value, np.float32) for value in (mean or 0, std or 1))
    return (floats - shift) / scale


def load_labels(path: str, examples: Examples, classes: int) -> np.ndarray:
    """The classes of the images that were chosen, ints from 0.

    Args:
        path: of a .npy or .npz file with the labels of all images.
        examples: the images.
        classes: of the network.

    Raises:
        ValueError: they are not one for each image, or there are no such classes.
    """
    labels = load_array(path, LABELS, "labels")
    if labels.shape != (examples.total,):
        raise ValueError(
            f"{path} holds {labels.dtype} of shape {labels.shape}; give one int for each of the "
            f"{examples.total} images."
        )
    return checked(dataclasses.replace(examples, labels=labels[examples.rows]), path, classes)


def checked(examples: Examples, path: str, classes: int) -> np.ndarray:
    """The labels of some images, if they are classes of the network.

    Raises:
        ValueError: they are not.
    """
    labels = np.asarray(examples.labels)
    count = len(examples.images)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path} holds {labels.dtype} of shape {labels.shape}; give one int for each of the "
            f"{count} images."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{path} holds labels from {labels.min()} to {labels.max()}; give those of "
            f"the network, 0 to {classes - 1}."
        )
    return labels
