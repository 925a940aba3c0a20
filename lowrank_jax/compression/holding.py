"""Activations of all batches between two stops: in memory, or in a file where they are many."""

import dataclasses
import tempfile
import warnings
import weakref
from typing import IO, Any

import jax
import numpy as np

IN_MEMORY = 2**32  # bytes of all batches together; more go to a file, which takes longer


class Holding:
    """Keeps what the batches give at one stop.

    The file lies in the folder for temporary files, which the variable TMPDIR of the environment
    names. No name leads to it, so that nothing is left of it when the process ends, however it
    ends.

    Args:
        batches: how many there are.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.file: IO[bytes] | None = None

    def keep(self, values: Any) -> Any:
        """Keeps a tree of arrays of one batch; gives the tree that `loaded` reads."""
        arrays = jax.tree.map(np.asarray, values)
        size = sum(array.nbytes for array in jax.tree.leaves(arrays))
        if size * self.batches <= IN_MEMORY:
            return arrays
        try:
            return jax.tree.map(self._in_file, arrays)
        except OSError as error:
            warnings.warn(
                f"{tempfile.gettempdir()} has no room for {size:,} bytes of activations ({error}), "
                "which stay in memory; set TMPDIR to a folder with more room.",
                stacklevel=2,
            )
            return arrays

    def _in_file(self, array: np.ndarray) -> "Stored":
        if self.file is None:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the last array
            weakref.finalize(self, self.file.close)
        start = self.file.seek(0, 2)
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(self.file)
        return Stored(self, start, jax.ShapeDtypeStruct(array.shape, array.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """An array in a file.

    Attributes:
        holding: owner of the file; the file goes when its last array goes.
        start: of this array in the file.
        like: its shape and type.
    """

    holding: Holding
    start: int
    like: jax.ShapeDtypeStruct

    def load(self) -> np.ndarray:
        """Reads the array."""
        file, size = self.holding.file, self.like.size * self.like.dtype.itemsize
        assert file is not None
        file.seek(self.start)
        return np.fromfile(file, np.uint8, size).view(self.like.dtype).reshape(self.like.shape)


def loaded(values: Any) -> Any:
    """The arrays of a tree that `Holding.keep` gave."""
    return jax.tree.map(lambda x: x.load() if isinstance(x, Stored) else x, values)
