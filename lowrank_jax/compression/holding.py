"""Activations of all batches between two stops: in memory, or in files where they are many."""

import dataclasses
import tempfile
import warnings
import weakref
from typing import Any

import jax
import numpy as np

from lowrank_jax.io.c_library import c_library

IN_MEMORY = 2**30  # bytes of all batches together; more go to files, which takes longer


class Holding:
    """Keeps what the batches give at one stop.

    The files lie in the folder for temporary files, which the variable TMPDIR of the environment
    names. No name leads to them, so that nothing is left of them when the process ends, however it
    ends. Each value of the program has a file of its own, which goes with the last of its arrays.

    Args:
        batches: how many there are.
        taken: bytes of all batches that are in memory already.
    """

    def __init__(self, batches: int, taken: int = 0) -> None:
        self.batches, self.taken = batches, taken
        self.files: dict[str, _File] = {}

    def keep(self, values: Any) -> Any:
        """Keeps a tree of arrays of one batch; gives the tree that `loaded` reads."""
        arrays = jax.tree.map(np.asarray, values)
        size = nbytes(arrays)
        if size * self.batches + self.taken <= IN_MEMORY:
            return arrays
        try:
            return jax.tree_util.tree_map_with_path(self._in_file, arrays)
        except OSError as error:
            warnings.warn(
                f"{tempfile.gettempdir()} has no room for {size:,} bytes of activations ({error}), "
                "which stay in memory; set TMPDIR to a folder with more room.",
                stacklevel=2,
            )
            return arrays

    def _in_file(self, path: Any, array: np.ndarray) -> "Stored":
        name = jax.tree_util.keystr(path)
        file = self.files[name] = self.files.get(name) or _File()
        like = jax.ShapeDtypeStruct(array.shape, array.dtype)
        return Stored(file, file.append(array), like)


class _File:
    """A file without a name, for arrays one after the other."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the last array
        weakref.finalize(self, self.file.close)

    def append(self, array: np.ndarray) -> int:
        """Writes an array, and gives the place where it starts."""
        start = self.file.seek(0, 2)
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(self.file)
        return start

    def read(self, start: int, like: jax.ShapeDtypeStruct) -> np.ndarray:
        """Reads the array that starts at a place, of a shape and a type."""
        self.file.seek(start)
        found = np.fromfile(self.file, np.uint8, like.size * like.dtype.itemsize)
        return found.view(like.dtype).reshape(like.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """An array in a file.

    Attributes:
        file: it goes when its last array goes.
        start: of this array in the file.
        like: its shape and type.
    """

    file: _File
    start: int
    like: jax.ShapeDtypeStruct

    def load(self) -> np.ndarray:
        """Reads the array."""
        return self.file.read(self.start, self.like)


def loaded(values: Any) -> Any:
    """The arrays of a tree that `Holding.keep` gave."""
    return jax.tree.map(lambda x: x.load() if isinstance(x, Stored) else x, values)


def nbytes(values: Any) -> int:
    """The bytes in memory of what `Holding.keep` gave."""
    return sum(x.nbytes for x in jax.tree.leaves(values) if not isinstance(x, Stored))


def give_back() -> None:
    """Gives memory that was freed back to the system, where the GNU allocator keeps it."""
    library = c_library()
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
