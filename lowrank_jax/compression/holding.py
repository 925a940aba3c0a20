"""Activations of all batches between two stops: in memory, or in a file where they are many."""

import tempfile
import warnings
from typing import Any

import jax
import numpy as np

IN_MEMORY = 2**30  # bytes of all batches together; more go to a file


class Holding:
    """Keeps what the batches give at one stop.

    Files lie in the folder for temporary files, which the variable TMPDIR of the environment names.
    No name leads to them, so that nothing is left of them when the process ends, however it ends.

    Args:
        batches: how many there are.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def keep(self, values: Any) -> Any:
        """A tree of arrays of one batch, as arrays of NumPy."""
        arrays = jax.tree.map(np.asarray, values)
        size = sum(array.nbytes for array in jax.tree.leaves(arrays))
        if size * self.batches <= IN_MEMORY:
            return arrays
        return jax.tree.map(_in_file, arrays)


def _in_file(array: np.ndarray) -> np.ndarray:
    """A copy of an array whose memory the system may write out; the array itself without space."""
    if not array.nbytes:
        return array
    try:
        with tempfile.TemporaryFile() as file:
            # Written, not mapped: without space a write to mapped memory kills the process.
            array.tofile(file)
            return np.memmap(file, array.dtype, "r", shape=array.shape or (1,)).reshape(array.shape)
    except OSError as error:
        warnings.warn(
            f"{tempfile.gettempdir()} has no room for {array.nbytes:,} bytes of activations "
            f"({error}), which stay in memory; set TMPDIR to a folder with more room.",
            stacklevel=2,
        )
        return array
