"""The order of the data: each batch is a function of the seed and of the number of its step."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lowrank_jax.calibration.inputs import as_arguments, is_iterable_of_batches
from lowrank_jax.training.fingerprints import fingerprint
from lowrank_jax.tree.kinds import whole

SHOWN = 8  # shapes in an error
LOG = logging.getLogger("lowrank_jax")


class Batches(Protocol):
    """Training data, batch by batch without an end.

    Attributes:
        epoch: batches of one pass over the data; None where they cannot be counted.
        facts: what a run that goes on must have again.
    """

    @property
    def epoch(self) -> int | None: ...

    @property
    def facts(self) -> dict[str, Any]: ...

    def after(self, step: int) -> Iterator[tuple]:
        """The batches that follow so many steps."""
        ...


def batches_of(given: Any, size: int = 128, seed: int = 0) -> Batches:
    """Training data in any form.

    Arrays in a tuple, the labels last, with the examples along their first axes, are shuffled anew
    in each epoch and cut into batches; the few examples left over are dropped. One array, or a dict
    of arrays, is treated alike and has no labels. Anything else that can be iterated over gives the
    batches themselves: a list, a loader, a generator, or a function that gives an iterator. A list
    is taken in its order, again and again, and so is a loader.

    Args:
        given: the data.
        size: examples of a batch of arrays.
        seed: of the shuffling.

    Raises:
        ValueError: the arrays differ in their examples, or have too few of them.

    Example:
        >>> data = batches_of((np.zeros((10, 4)), np.arange(10)), size=4)
        >>> first = data.after(0)
        >>> [next(first)[1].tolist() for _ in range(3)]
        [[4, 6, 2, 7], [3, 5, 9, 0], [9, 1, 3, 8]]
        >>> next(data.after(2))[1].tolist()
        [9, 1, 3, 8]
    """
    if given is None or isinstance(given, int | float):
        raise ValueError(
            f"batches={given!r} is not allowed; give arrays (inputs, labels), or an iterable of "
            "such batches."
        )
    if not (callable(given) or is_iterable_of_batches(given)):
        return _Shuffled(as_arguments(given), size, seed)
    if isinstance(given, Sequence):
        return _Listed(given)
    return _Streamed(given)


def _example(batch: Any) -> tuple:
    """A batch as arrays; PyTorch's loaders give a list (inputs, labels)."""
    return as_arguments(tuple(batch) if isinstance(batch, list) else batch)


class _Shuffled:
    """Arrays of which every epoch is a permutation."""

    def __init__(self, arrays: tuple, size: int, seed: int) -> None:
        counts = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(arrays)}
        if len(counts) != 1:
            shapes = dict.fromkeys(tuple(x.shape) for x in jax.tree.leaves(arrays))
            raise ValueError(
                f"Arrays of shapes {', '.join(map(str, [*shapes][:SHOWN]))} are not allowed; give "
                "inputs and labels as arrays with the same number of examples along the first "
                "axis. A list of numbers becomes one by np.asarray."
            )
        [self.count] = counts
        size = whole("batch_size", size)
        if self.count < size:
            raise ValueError(
                f"batch_size={size} is more than the {self.count} training examples; make it "
                "smaller."
            )
        self.arrays, self.size, self.seed = arrays, size, seed

    @property
    def epoch(self) -> int:
        return self.count // self.size

    @property
    def facts(self) -> dict[str, Any]:
        own = {"examples": self.count, "batch_size": self.size}
        return own | {"data": fingerprint(self.arrays)}

    def after(self, step: int) -> Iterator[tuple]:
        for number in itertools.count(step):
            rows = self._rows(number)
            yield jax.tree.map(lambda x, rows=rows: x[rows], self.arrays)

    def _rows(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.epoch)
        order = _permutation(self.count, self.seed, epoch)
        return order[place * self.size : (place + 1) * self.size]


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class _Listed:
    """Batches that can be had by their numbers."""

    def __init__(self, batches: Sequence) -> None:
        if not len(batches):
            raise ValueError("There are no batches; give at least one.")
        self.batches = batches

    @property
    def epoch(self) -> int:
        return len(self.batches)

    @property
    def facts(self) -> dict[str, Any]:
        return {"batches": len(self.batches), "data": fingerprint(_example(self.batches[0]))}

    def after(self, step: int) -> Iterator[tuple]:
        for number in itertools.count(step):
            yield _example(self.batches[number % len(self.batches)])


class _Streamed:
    """Batches that can only be had one after the other."""

    epoch = None

    def __init__(self, given: Iterable | Callable[[], Iterable]) -> None:
        self.given = given

    @property
    def facts(self) -> dict[str, Any]:
        return {}

    def after(self, step: int) -> Iterator[tuple]:
        if step:
            LOG.warning(
                "These batches cannot be had by their numbers: the first %d are read and dropped.",
                step,
            )
        return map(_example, itertools.islice(self._all(), step, None))

    def _once(self) -> Iterable:
        found = self.given() if callable(self.given) else self.given
        if isinstance(found, Iterable) or hasattr(found, "__getitem__"):
            return found
        raise ValueError(
            f"The function of the batches gives a {type(found).__name__}; give one that gives an "
            "iterator of batches (inputs, labels)."
        )

    def _all(self) -> Iterator:
        """All batches, again and again where that is possible."""
        while True:
            count = 0
            for batch in self._once():
                count += 1
                yield batch
            if not count or isinstance(self.given, Iterator):
                return
