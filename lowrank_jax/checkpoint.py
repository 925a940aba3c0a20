"""Weights as one ``.npz`` file: plain arrays named by their paths, read without pickle."""

import os
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

import chex
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict


def save_weights(path: str | os.PathLike, variables: chex.ArrayTree) -> None:
    """Writes a nested mapping of arrays; the file appears whole or not at all."""
    path = Path(path)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def load_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_weights` wrote, as a nested dict of numpy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no whole ``.npz`` file of plain arrays.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return unflatten_dict(dict(arrays), sep="/")
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no whole .npz file of plain arrays: {error}") from error


def pretrained() -> dict[str, Any]:
    """Variables of `lowrank_jax.models.NIN` trained on CIFAR-10, from inside the package.

    Example:
        >>> pretrained()["params"]["Conv_2"]["kernel"].shape
        (5, 5, 96, 192)
    """
    with resources.as_file(resources.files("lowrank_jax") / "assets" / "cifar10_nin.npz") as path:
        return load_weights(path)
