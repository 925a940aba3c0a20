"""CIFAR-10 as arrays: all of it, through TensorFlow Datasets, or the sample in the package."""

import dataclasses
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.data.records import count_rows, named_builder, read_rows, stacked

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images scaled to [0, 1], per channel
STD = (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images (count, 32, 32, 3) as uint8 and labels (count,) as int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def cifar10(split: str, data_dir: str | None = None) -> Dataset:
    """Reads a split of a prepared CIFAR-10 with ``tfds.data_source``; TensorFlow is not needed.

    Args:
        split: "train" (50,000 images) or "test" (10,000), or a slice such as "train[:1000]".
        data_dir: folder that holds ``cifar10/<version>/``; the default is the variable
            TFDS_DATA_DIR, then ``~/tensorflow_datasets``.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        FileNotFoundError: no prepared copy is there, or it lacks files.
        OSError: a file of it is damaged.
    """
    builder = named_builder("cifar10", data_dir)
    rows = read_rows(builder, split, range(count_rows(builder, split)))
    return Dataset(stacked(rows, "image"), stacked(rows, "label").astype(np.int32))


def sample(split: str) -> Dataset:
    """The CIFAR-10 images inside the package, from the set's own splits.

    Args:
        split: "train", 2,000 images, or "test", 1,000.

    Raises:
        ValueError: the split is another one.

    Example:
        >>> len(sample("test"))
        1000
    """
    from PIL import Image

    folder = resources.files("lowrank_jax.data") / "assets"
    labels = json.loads((folder / "cifar10_sample.json").read_text())["labels"]
    if split not in labels:
        raise ValueError(f"The sample has no split {split!r}; choose one of {sorted(labels)}.")
    with (folder / f"cifar10_{split}.webp").open("rb") as file, Image.open(file) as mosaic:
        images = np.asarray(mosaic).reshape(-1, 32, 32, 3)
    return Dataset(images, np.asarray(labels[split], np.int32))


def normalize(images: jax.Array) -> jax.Array:
    """uint8 images to float32 with mean 0 and deviation 1 per channel over the training set.

    Args:
        images: uint8 array of shape (..., 3).

    Example:
        >>> black = normalize(jnp.zeros((1, 32, 32, 3), "uint8"))
        >>> black.shape, [round(float(value), 2) for value in black[0, 0, 0]]
        ((1, 32, 32, 3), [-1.99, -1.98, -1.71])
    """
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
