"""The file formats of weights, each with its reader; nothing here runs pickled code."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import flax
import numpy as np

from lowrank_jax.io import npz, safetensors
from lowrank_jax.io.names import named, nest, plain


def read_npz(path: Path) -> dict[str, Any]:
    """Reads arrays named by their paths, the parts joined by "/"."""
    return nest(npz.read_arrays(path))


def write_npz(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_npz` reads."""
    npz.write_arrays(file, named(variables))


def read_safetensors(path: Path) -> dict[str, Any]:
    """Reads arrays named by their paths, in the natural order of the names."""
    return nest(safetensors.read_arrays(path.read_bytes()))


def write_safetensors(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_safetensors` reads."""
    safetensors.write_arrays(file, named(variables))


def read_msgpack(path: Path) -> dict[str, Any]:
    """Reads the format of `flax.serialization`.

    Raises:
        ValueError: the file holds no mapping, or a mapping whose keys are of several types.
    """
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not a mapping of names to arrays")
    return _arrays(tree)


def _arrays(value: Any) -> Any:
    """Numpy arrays for the leaves; the keys of one mapping are all strings or all ints."""
    if isinstance(value, dict):
        if len({type(key) for key in value}) > 1:
            raise ValueError(f"the keys {list(value)} of one mapping are of several types")
        return {key: _arrays(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_arrays(own) for own in value]
    return None if value is None else np.asarray(value)


def write_msgpack(file: BinaryIO, variables: Mapping[str, Any]) -> None:
    """Writes what `read_msgpack` reads."""
    file.write(flax.serialization.msgpack_serialize(plain(variables), in_place=True))


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npz": read_npz,
    ".safetensors": read_safetensors,
    ".msgpack": read_msgpack,
}
WRITERS: dict[str, Callable[[BinaryIO, Mapping[str, Any]], None]] = {
    ".npz": write_npz,
    ".safetensors": write_safetensors,
    ".msgpack": write_msgpack,
}
