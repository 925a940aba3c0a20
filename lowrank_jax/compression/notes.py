"""What is noted of each batch at a stop, and what becomes of the notes of all batches."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.noise import signal_share
from lowrank_jax.calibration.sums import POSITIONS, AnyGeometry, geometry_of, patch_sums
from lowrank_jax.compression.outline import Outline, Shift
from lowrank_jax.compression.segments import FOLDS, Live, Note
from lowrank_jax.compression.shortcuts import Shortcut
from lowrank_jax.factorization.factors import wide
from lowrank_jax.factorization.moments import Moments
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.factored import run_factored
from lowrank_jax.program.kernel import Kernel
from lowrank_jax.program.reading import Reading


class Kept(Protocol):
    """Keeps rows of what a layer reads and gives in a batch, and of what is added to that."""

    def added(self, live: Live) -> tuple: ...

    def keep(self, rows: Any) -> None: ...


def fit_note(
    outline: Outline,
    place: int,
    shortcut: Shortcut | None,
    roots: jax.Array,
    kept: Kept | None = None,
) -> Note:
    """What a fit needs of a batch: moments, and sums for the means.

    Args:
        outline: of the program.
        place: of the layer's equation.
        shortcut: what is added to the layer's outputs.
        roots: of the importance of the outputs.
        kept: takes the rows whose moments these are.
    """
    x_number, y_number = values_of(outline, place)
    sums = _fit_sums(geometry_of(outline.readings[place]))

    def note(live: Live, turn: int) -> dict[str, Any]:
        x, y = live.small.get(x_number, live.dense[x_number]), live.dense[y_number]
        wanted = shortcut.wanted(live, y) if shortcut else y
        more = (y, *kept.added(live)) if kept else ()
        found, rows = sums(x, wanted, more, turn // FOLDS, roots)
        if kept:
            kept.keep(rows)
        return found

    return note


def values_of(outline: Outline, place: int) -> tuple[int, int]:
    """The numbers of what a layer's equation reads, beside the kernel, and of what it gives."""
    reading = outline.readings[place]
    x = reading.eqn.invars[1 - reading.operand]
    return outline.number(x), outline.gives(reading.eqn)[0]


@functools.lru_cache(maxsize=256)  # layers of one geometry share a program
def _fit_sums(geometry: AnyGeometry) -> Callable:
    """The moments, sums of the inputs over the batch, of the outputs over all but the channels."""

    def sums(x: jax.Array, y: jax.Array, more: tuple, turn: jax.Array, roots: jax.Array) -> Any:
        moments, patches = patch_sums(geometry, x, y, turn, roots=roots)
        outputs = [wide(geometry.rows(x, other, turn, POSITIONS)[1]) for other in more]
        rows = (patches, outputs) if more else ()
        return {"sums": moments, **_mean_sums(geometry, x, y)}, rows

    return jax.jit(sums, compiler_options=default_options())


def _mean_sums(geometry: AnyGeometry, x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    batch, channels = geometry.axes
    if channels is None:  # the means of several axes of outputs are not matched
        return {}
    total = wide(x).sum(batch, keepdims=True)
    size = str(total.shape)  # images of several sizes have several means
    return {
        "inputs": {size: total},
        "images": {size: jnp.float32(x.size // total.size)},
        "outputs": _channel_sums(y, channels),
        "positions": jnp.float32(y.size // y.shape[channels]),
    }


def mean_note(shift: Shift) -> Note:
    """Sums of a value over all but the channels in both networks, and their count."""

    def note(live: Live, turn: int) -> tuple:
        del turn
        one, two = (jnp.asarray(x[shift.data]) for x in (live.dense, live.small))
        sums = (_channel_sums(x, shift.axis) for x in (one, two))
        return *sums, one.size // one.shape[shift.axis]

    return note


def _channel_sums(x: jax.Array, channels: int) -> jax.Array:
    """Sums over all axes but the channels; on a CPU a product with ones is ten times as fast."""
    moved = jnp.moveaxis(wide(x), channels, -1)
    rows = moved.sum(0) if moved.ndim > 1 else moved  # so that the product adds up fewer numbers
    rows = rows.reshape(-1, x.shape[channels])
    ones = jnp.ones(len(rows), rows.dtype)
    return jnp.matmul(ones, rows, precision=jax.lax.Precision.HIGHEST)


def _others(x: Any, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(x.ndim) if other != axis)


def trusted(lack: Callable[[Sequence], np.ndarray], found: Sequence) -> np.ndarray:
    """A mean difference over all images, less the share of it that is noise.

    One image has nothing that it can be held against, and all of it counts as noise.
    """
    if len(found) < FOLDS:
        return 0 * lack(found)
    one, two = (lack([own]) for own in found)
    return signal_share(one, two) * lack(found)


def drifted_mean(found: Sequence[tuple]) -> np.ndarray:
    """What the means of a value lack in the compressed network, from `mean_note`."""
    dense, small, count = (np.sum(xs, 0) for xs in zip(*found, strict=True))
    return (dense - small) / count


def lacking_mean(reading: Reading, kernel: Kernel, found: Sequence[Mapping]) -> np.ndarray:
    """What the means of a layer's outputs lack beside those of the dense layer.

    A layer is linear: the mean of its outputs is the output of the mean of its inputs.
    """
    kernel = jax.tree.map(lambda a: a.astype(jnp.float32), kernel)
    sizes = dict.fromkeys(size for note in found for size in note["inputs"])
    small = sum(_small_outputs(reading, kernel, found, size) for size in sizes)
    return (_total(found, "outputs") - small) / _total(found, "positions")


def _total(found: Sequence[Mapping], name: str) -> np.ndarray:
    return np.sum([note[name] for note in found], axis=0)


def _small_outputs(
    reading: Reading, kernel: Kernel, found: Sequence[Mapping], size: str
) -> np.ndarray:
    """The sums of a compressed layer's outputs for all images of one size."""
    own = [note for note in found if size in note["inputs"]]
    inputs, images = (_total([note[name] for note in own], size) for name in ("inputs", "images"))
    outputs = run_factored(reading, jnp.asarray(inputs / images, jnp.float32), kernel)
    axis = reading.channel_axis
    assert outputs is not None and axis is not None
    return images * np.asarray(outputs, np.float64).sum(_others(outputs, axis))


def folds_of(found: Sequence[Mapping], path: str, centred: bool) -> list[list[Moments]]:
    """For each set of images the moments of each kernel that ran at once, about means or zero.

    Raises:
        ValueError: the activations are not finite.
    """
    totals = [own["sums"] for own in found]
    if not all(np.isfinite(x).all() for total in totals for x in total.values()):
        raise ValueError(
            f"{path}: the activations hold NaN or infinite values; check the weights and the "
            "calibration images."
        )
    folds = [_moments(total) for total in totals]
    return folds if centred else [[own.about_zero() for own in fold] for fold in folds]


def _moments(total: Mapping[str, np.ndarray]) -> list[Moments]:
    rest = [name for name in total if name != "count"]
    return [
        Moments(count=int(count), **{name: total[name][index] for name in rest})
        for index, count in enumerate(total["count"])
    ]
