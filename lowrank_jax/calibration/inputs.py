"""Inputs of a network: one batch, or an iterable of batches."""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from lowrank_jax.tree.kinds import whole
from lowrank_jax.tree.warning import warn

LOG = logging.getLogger("lowrank_jax")
BATCH = 256
MANY = 2**17  # images, more than any calibration needs
ENDLESS = (
    "%d images were read so far. A loader that never ends has to be cut: give lambda: "
    "itertools.islice(loader, 16) for 16 batches."
)
# What makes a network train, in the arguments of its call.
TRAINING = {"train": True, "training": True, "is_training": True, "deterministic": False}


class Inputs:
    """Batches of inputs, each a tuple of the arguments that the network takes after its variables.

    One batch is an array, a dict or another pytree of arrays, or a tuple of those, which are spread
    over the network's arguments. All arrays have the images along their first axis. Anything else
    that can be iterated over, such as a list, a generator, a loader of Grain or of TensorFlow
    Datasets, or a function that gives an iterator, is an iterable of batches. Each batch holds what
    the network takes, and no labels. For a loader that also gives labels, give
    ``lambda: (images for images, labels in loader)``.

    Args:
        inputs: as above.
        size: images of a batch, into which one batch is cut.

    Raises:
        ValueError: there are no inputs, or their arrays differ in the number of images.

    Example:
        >>> [batch[0].shape for batch in Inputs(np.ones((5, 8, 8, 3), np.float32), size=2)]
        [(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)]
    """

    def __init__(self, inputs: Any, size: int = BATCH) -> None:
        self._given, self._size = inputs, size
        self._started: Iterator | None = None
        if isinstance(inputs, Iterator):
            self._started = inputs
        if self.one_batch:
            images(as_arguments(inputs))

    @property
    def one_batch(self) -> bool:
        """Whether one batch was given, which is cut here."""
        return not (callable(self._given) or is_iterable_of_batches(self._given))

    @property
    def again(self) -> bool:
        """Whether the batches can be had more than once."""
        return self._started is None

    def __iter__(self) -> Iterator[tuple]:
        if self.one_batch:
            yield from self._cut(as_arguments(self._given))
            return
        given = iter(self._given() if callable(self._given) else self._given)
        batches = [as_arguments(batch) for batch in itertools.islice(given, 2)]
        if len(batches) == 1:  # of which one part is held against the other
            yield from self._cut(batches[0])
            return
        count = 0
        for batch in itertools.chain(batches, given):
            arguments = as_arguments(batch)
            count += images(arguments)
            if count >= MANY > count - images(arguments):
                LOG.warning(ENDLESS, count)
            yield arguments

    def _cut(self, arguments: tuple) -> Iterator[tuple]:
        """Pieces of nearly equal size, two at least where there are two images."""
        count = images(arguments)
        pieces = max(math.ceil(count / self._size), min(2, count))
        size = math.ceil(count / pieces)
        for start in range(0, count, size):
            yield jax.tree.map(lambda x, start=start: x[start : start + size], arguments)

    def first(self) -> tuple:
        """The first batch; an iterator starts with it again."""
        iterator = iter(self)
        batch = next(iterator, None)
        if batch is None:
            raise ValueError("No calibration data: give at least one batch of inputs.")
        if self._started is not None:
            self._given = self._started = itertools.chain([batch], iterator)
        return batch

    def held(self) -> "Inputs":
        """The same batches, which can be had again."""
        return self if self.again else Inputs(list(self), self._size)

    def __len__(self) -> int:
        """How many batches there are, for one batch or for a sequence."""
        if self.one_batch:
            return sum(1 for _ in self)
        return len(self._given)


def is_iterable_of_batches(given: Any) -> bool:
    """Whether something that is no function is to be iterated over, and is not one batch."""
    if isinstance(given, (Mapping, tuple, str, bytes)) or hasattr(given, "shape"):
        return False
    return isinstance(given, Iterable) or hasattr(given, "__getitem__")


def as_arguments(batch: Any) -> tuple:
    """A batch as the arguments of a network, all leaves arrays.

    Raises:
        ValueError: a leaf is no array of real numbers.
    """
    arguments = batch if isinstance(batch, tuple) else (batch,)
    return jax.tree.map(_as_array, arguments)


def _as_array(leaf: Any) -> Any:
    known = isinstance(leaf, jax.Array) or hasattr(leaf, "aval")
    array = leaf if known and not _is_explicit(leaf) else np.asarray(leaf)
    extended = jax.numpy.issubdtype(array.dtype, jax.dtypes.extended)  # keys of random numbers
    if not extended and (array.dtype.kind not in "fiubV" or array.dtype.names):
        raise ValueError(
            f"The inputs hold a {type(leaf).__name__} of type {array.dtype}; give arrays of real "
            "numbers, or batches of those."
        )
    return array


def _is_explicit(leaf: Any) -> bool:
    """Whether an array lies on a mesh of explicit axes, where no part of it can be picked."""
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    if mesh is None or isinstance(leaf, jax.core.Tracer):
        return False
    return AxisType.Explicit in mesh.axis_types


def picking(arguments: tuple) -> str:
    """How the images are picked from batches that hold more, as a loader's do; "" if they do not.

    Example:
        >>> batch = {"image": np.ones((2, 8, 8, 3)), "label": np.ones(2, int)}
        >>> picking((batch,)).rpartition("give ")[2].strip()
        "lambda: (batch['image'] for batch in loader)."
    """
    first = arguments[0] if len(arguments) == 1 else arguments
    if isinstance(first, Mapping):
        what, name = f"dict of {list(first)}", next(iter(first), None)
        pick = f"batch[{name!r}] for batch in loader"
    elif isinstance(first, tuple | list):
        what, pick = f"{type(first).__name__} of {len(first)}", "images for images, *_ in loader"
    else:
        return ""
    return (
        f"Each batch is a {what}. If the network takes one of these alone, such as images without "
        f"labels, give that one; of a loader's batches, give lambda: ({pick}).\n"
    )


def images(arguments: tuple) -> int:
    """How many images a batch has.

    Raises:
        ValueError: there are none, or the arrays differ.
    """
    leaves = jax.tree.leaves(arguments)
    sizes = {x.shape[0] if x.ndim else None for x in leaves}
    if len(sizes) != 1 or None in sizes or not all(x.size for x in leaves):
        shapes = [tuple(x.shape) for x in leaves]
        raise ValueError(
            f"No calibration data: inputs of shapes {shapes} are not allowed; give one or more "
            "arrays with the same number of images, at least one, along the first axis."
        )
    [count] = sizes
    return int(count)  # type: ignore[arg-type]


def shape_key(arguments: tuple) -> str:
    """Tells batches apart that need programs of their own."""
    return str(jax.tree.map(lambda x: (x.shape, x.dtype), arguments))


def shapes_of(arguments: tuple, count: int) -> tuple:
    """The shapes of a batch of so many images.

    Raises:
        ValueError: ``count`` is no int of 1 or more.
    """
    size = whole("batch", count)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), jnp.asarray(x[:0]).dtype), arguments
    )


def check_evaluation(kwargs: Mapping[str, Any], arguments: tuple) -> None:
    """Raises for arguments that make a network train; warns of raw images.

    Raises:
        ValueError: an argument, such as ``train=True``, makes the network train.
    """
    for name, value in TRAINING.items():
        if name in kwargs and kwargs[name] is value:
            raise ValueError(
                f"{name}={value} is not allowed: a network is calibrated and compressed as it runs "
                f"in evaluation; give {name}={not value}."
            )
    warn_if_raw(arguments)


def warn_if_raw(arguments: tuple) -> None:
    """Warns of images that seem to be raw, as ints are."""
    leaves = [x for x in jax.tree.leaves(arguments) if getattr(x, "ndim", 0) > 3]
    raw = [x for x in leaves if x.dtype.kind in "iu"]
    if raw:
        warn(
            f"The inputs are {raw[0].dtype} images of shape {tuple(raw[0].shape)}: give what the "
            "network takes, which is usually scaled and normalised."
        )


def tell_labels(arguments: tuple) -> None:
    """Logs that an input after the first holds one int for each image, as labels do."""
    for number, x in enumerate(arguments[1:], 2):
        if getattr(x, "ndim", 0) == 1 and x.dtype.kind in "iu":
            LOG.warning(
                "Argument %d of the network holds one int for each image. If these are labels, "
                "leave them out: inputs alone are read.",
                number,
            )


def tell_together(arguments: tuple) -> None:
    """Logs that costs are those of a whole batch."""
    LOG.warning(
        "The network does not run on one image alone, or a mesh of devices cannot divide one: "
        "costs, and budgets that are counts, are those of %d images.",
        images(arguments),
    )
