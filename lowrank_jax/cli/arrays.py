"""Images and labels of the user's own, in .npy files."""

from pathlib import Path

import numpy as np


def load_images(path: str, mean: list[float] | None, std: list[float] | None) -> np.ndarray:
    """Images (batch, ..., channels) as float32; uint8 is scaled to [0, 1].

    Args:
        path: of the file.
        mean, std: of the channels, or one for all; the mean is subtracted, then the rest is
            divided.

    Raises:
        ValueError: the file holds no images, or of another type.
    """
    images = load_array(path, "images (batch, ..., channels)")
    if images.ndim < 3 or not images.size:
        raise ValueError(
            f"{path} holds an array {images.shape}; give images (batch, ..., channels)."
        )
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
    scaled = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    shift, scale = (np.asarray(value, np.float32) for value in (mean or 0, std or 1))
    return (scaled - shift) / scale


def load_labels(path: str, count: int, classes: int) -> np.ndarray:
    """The classes of so many images, ints from 0.

    Raises:
        ValueError: they are not one for each image, or there are no such classes.
    """
    labels = load_array(path, "labels")
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


def load_array(path: str, what: str) -> np.ndarray:
    """The array of a .npy file.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}; give {what} as numpy.save writes them.")
    try:
        with Path(path).open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # damaged bytes make numpy raise whatever it meets
        raise ValueError(
            f"{path} is no .npy file of numbers ({str(error)[:100]}); give {what} as numpy.save "
            "writes them."
        ) from error
