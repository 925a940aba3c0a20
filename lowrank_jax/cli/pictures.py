"""Images in a folder of PNG and JPEG files, or in a folder for each class."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lowrank_jax.cli.choice import Choice, Examples

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
GREY = {"1", "L"}


def read_pictures(folder: Path, choice: Choice) -> Examples:
    """The pictures of a folder, in the order of their names.

    In folders for classes the label is the place of the folder in the order of their names. Grey
    pictures alone have one channel, all others three.

    Raises:
        ImportError: Pillow is not installed.
        OSError: a file is damaged.
        ValueError: there are no pictures, or they differ in size and no size is given.
    """
    paths, labels = _found(folder)
    rows = choice.rows(len(paths))
    chosen = [paths[row] for row in rows]
    images = np.stack(_decoded(chosen, choice.size))
    own = None if labels is None else np.asarray(labels)[rows]
    return Examples(images=images, labels=own, rows=rows, total=len(paths))


def _found(folder: Path) -> tuple[list[Path], list[int] | None]:
    """The files, and the labels where there are folders for classes."""
    if direct := _pictures(folder):
        return direct, None
    classes = sorted(own for own in folder.iterdir() if own.is_dir())
    files = [_pictures(own) for own in classes]
    if not any(files):
        names = ", ".join(own.name for own in classes[:20])
        raise ValueError(
            f"{folder} holds no .png or .jpg files, nor do the folders in it ({names or 'none'}); "
            "give a folder that does."
        )
    labels = [label for label, own in enumerate(files) for _ in own]
    return [path for own in files for path in own], labels


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _decoded(paths: Sequence[Path], size: tuple[int, int] | None) -> list[np.ndarray]:
    """The pictures as uint8 (height, width, channels), all of one shape."""
    heads = {path: _head(path) for path in paths}
    sizes = {own: path for path, (_, own) in heads.items()}
    if size is None and len(sizes) > 1:
        shapes = [f"{path} {height}x{width}" for (width, height), path in list(sizes.items())[:2]]
        raise ValueError(
            f"The pictures differ in size ({', '.join(shapes)}); give --size, such as --size 224."
        )
    mode = "L" if {own for own, _ in heads.values()} <= GREY else "RGB"
    return [fitted(_pixels(path, mode), size) for path in paths]


def fitted(picture: "Image.Image", size: tuple[int, int] | None) -> np.ndarray:
    """A picture whose shorter side is scaled to a size (height, width), and whose centre is cut.

    Example:
        >>> from PIL import Image
        >>> fitted(Image.new("RGB", (40, 30)), (16, 16)).shape
        (16, 16, 3)
    """
    from PIL import Image, ImageOps

    if size is not None:
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _head(path: Path) -> tuple[str, tuple[int, int]]:
    """The mode and the size (width, height) of a picture."""
    with _opened(path) as picture:
        return picture.mode, picture.size


def _pixels(path: Path, mode: str) -> "Image.Image":
    with _opened(path) as picture:
        return picture.convert(mode)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["Image.Image"]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Reading pictures needs Pillow: pip install 'lowrank-jax[demo]'."
        ) from error
    try:
        with Image.open(path) as picture:
            yield picture
    except OSError as error:
        raise OSError(f"{path} is no whole picture; remove it, or repair it: {error}") from error
