"""Images of a data set that TensorFlow Datasets prepared, by its name or its folder."""

from pathlib import Path
from typing import Any

import numpy as np

from lowrank_jax.cli.arrays import IMAGES, LABELS, entry
from lowrank_jax.cli.choice import Choice, Examples
from lowrank_jax.cli.pictures import fitted
from lowrank_jax.data.records import count_rows, folder_builder, named_builder, read_rows

PREFIX, SPLIT = "tfds:", "train"


def read_named(name: str, choice: Choice) -> Examples:
    """Images of "name/split" or "name/config/split"; of the split "train" where there is no slash.

    Raises:
        FileNotFoundError: no prepared copy is there.
        ImportError: tensorflow-datasets is not installed.
        ValueError: there is no such data set or split, or it has no images.
    """
    data_set, _, split = name.rpartition("/")
    builder = named_builder(data_set or split, choice.data_dir)
    return _read(builder, split if data_set else SPLIT, choice)


def read_folder(folder: Path, choice: Choice) -> Examples:
    """Images of the split "train" of the data set in a folder, or of its only split.

    Raises:
        FileNotFoundError: it is not the folder of a whole data set.
        ImportError: tensorflow-datasets is not installed.
        ValueError: it has no images.
    """
    builder = folder_builder(folder)
    splits = list(builder.info.splits)
    return _read(builder, splits[0] if len(splits) == 1 else SPLIT, choice)


def _read(builder: Any, split: str, choice: Choice) -> Examples:
    try:
        total = count_rows(builder, split)
    except ValueError as error:
        raise ValueError(
            f"{builder.name} has no split {split!r}; give one of {sorted(builder.info.splits)}."
        ) from error
    rows = choice.rows(total)
    found = read_rows(builder, split, rows.tolist())
    where = f"A record of {builder.name}"
    images = [_sized(entry(row, IMAGES, where), choice.size) for row in found]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"The images of {builder.name} differ in size; give --size, such as --size 224."
        )
    labelled = any(name in found[0] for name in LABELS)
    labels = np.asarray([entry(row, LABELS, where) for row in found]) if labelled else None
    return Examples(images=np.stack(images), labels=labels, rows=rows, total=total)


def _sized(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    if size is None:
        return image
    from PIL import Image  # of the extra "data", too

    pixels = image[..., 0] if image.shape[-1] == 1 else image
    return fitted(Image.fromarray(pixels), size)
