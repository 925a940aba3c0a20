"""Activations of all batches between two stops: in memory, or in files where they are many."""

import dataclasses
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lowrank_jax.io.c_library import c_library
from lowrank_jax.tree.warning import warn

ALIGNED = 64  # bytes, at which JAX reads an array in place
IN_MEMORY = 2**28  # bytes of all batches together; more go to files


class Holding:
    """Keeps what the batches give at one stop.

    Each value of the program has a file of its own.

    Args:
        batches: how many there are.
        files: where files are from.
        taken: bytes of all batches that are in memory already.
    """

    def __init__(self, batches: int, files: "Files", taken: int = 0) -> None:
        self.batches, self.files, self.taken = batches, files, taken
        self.named: dict[str, _File] = {}

    def keep(self, values: Any) -> Any:
        """Keeps a tree of arrays of one batch; gives the tree that `loaded` reads."""
        arrays = jax.tree.map(np.asarray, values)
        size = nbytes(arrays)
        if size * self.batches + self.taken <= IN_MEMORY:
            return arrays
        try:
            return jax.tree_util.tree_map_with_path(self._in_file, arrays)
        except OSError as error:
            warn(
                f"{tempfile.gettempdir()} has no room for {size:,} bytes of activations ({error}), "
                "which stay in memory; set TMPDIR to a folder with more room."
            )
            return arrays

    def _in_file(self, path: Any, array: np.ndarray) -> "Stored":
        name = jax.tree_util.keystr(path)
        file = self.named[name] = self.named.get(name) or self.files.take()
        like = jax.ShapeDtypeStruct(array.shape, array.dtype)
        return Stored(file, file.append(array), like)


class Files:
    """Files for activations, which are written again once the last of their arrays is gone.

    The system has the memory of such a file at hand: writing takes a tenth of the time. The files
    lie in the folder for temporary files, which the variable TMPDIR of the environment names. No
    name leads to them, so that nothing is left of them when the process ends, however it ends.
    """

    def __init__(self) -> None:
        self.spare: list[Any] = []
        weakref.finalize(self, _close, self.spare)

    def take(self) -> "_File":
        """A file for new arrays."""
        file = self.spare.pop() if self.spare else tempfile.TemporaryFile()  # noqa: SIM115
        found = _File(file)
        weakref.finalize(found, _take_back, weakref.ref(self), file)
        return found


def _take_back(owner: Callable[[], Files | None], file: Any) -> None:
    """What becomes of a file whose arrays are gone."""
    files = owner()
    if files is None:
        file.close()
    else:
        files.spare.append(file)


def _close(files: list[Any]) -> None:
    for file in files:
        file.close()


class _File:
    """A file for arrays one after the other."""

    def __init__(self, file: Any) -> None:
        self.file, self.end = file, 0

    def append(self, array: np.ndarray) -> int:
        """Writes an array, and gives the place where it starts."""
        start = self.file.seek(self.end + -self.end % ALIGNED)
        self.end = start + array.nbytes
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(self.file)
        return start

    def read(self, start: int, like: jax.ShapeDtypeStruct) -> np.ndarray:
        """The array that starts at a place, of a shape and a type; it is read as it is used."""
        if not like.size:  # nothing to map
            return np.empty(like.shape, like.dtype)
        size = like.size * like.dtype.itemsize
        found: Any = np.memmap(self.file, np.uint8, "r", start, size)
        found.keeps = self  # the file is not written again while its values are read
        return np.asarray(found).view(like.dtype).reshape(like.shape)


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
