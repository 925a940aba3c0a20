"""Arrays in a ``.npz`` file, which are read as they were written or not at all."""

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16)
SEAL = b"lowrank_jax sha256 "  # begins the comment of the archive; numpy reads past it
SUFFIX = ".npy"


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a file by their names, in native byte order.

    Files of `write_arrays` carry a seal over names, sizes and checksums, which is verified. In any
    file the checksum of each array is verified, and no name may come twice.

    numpy stores bfloat16 as two raw bytes without the type's name; nothing else that JAX computes
    with is two raw bytes, so these are bfloat16 again.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds something else than arrays of numbers.
    """
    with path.open("rb") as file:
        try:
            return _read_all(file)
        except Exception as error:  # damaged bytes make zipfile and numpy raise whatever they meet
            raise ValueError(str(error)) from error


def write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes what `read_arrays` reads, and `numpy.load` too.

    Raises:
        ValueError: an array has a type that the format does not keep.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            _check_type(name, array)
            with archive.open(zipfile.ZipInfo(name + SUFFIX), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        archive.comment = SEAL + _digest(archive.infolist())


def _read_all(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_names([member.filename for member in members])
        _check_seal(archive.comment, members)
        return {member.filename.removesuffix(SUFFIX): _read(archive, member) for member in members}


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    name = member.filename.removesuffix(SUFFIX)
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # at the end of its bytes the checksum of a member is verified
            raise ValueError(f"{name} is longer than its shape {array.shape} says")
    if array.dtype == np.dtype("V2"):
        return array.view(BFLOAT16)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name} has type {array.dtype}, which is no number")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_type(name: str, array: np.ndarray) -> None:
    nameless = array.dtype.isbuiltin == 2  # a type that numpy stores without its name
    if nameless and array.dtype != BFLOAT16:
        raise ValueError(
            f"{name} has type {array.dtype}, which .npz does not keep; write .safetensors or "
            ".msgpack."
        )


def _check_names(names: Sequence[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{name} comes {count} times")
        if not name.endswith(SUFFIX):
            raise ValueError(f"{name} is no array, which would end in {SUFFIX}")


def _check_seal(comment: bytes, members: Sequence[zipfile.ZipInfo]) -> None:
    if comment.startswith(SEAL) and comment != SEAL + _digest(members):
        raise ValueError("its arrays are not those that were written into it")


def _digest(members: Sequence[zipfile.ZipInfo]) -> bytes:
    facts = sorted((member.filename, member.CRC, member.file_size) for member in members)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest().encode()
