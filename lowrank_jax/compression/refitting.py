"""Fits a layer again to what an activation shows of its errors, from rows that were kept.

The rows are those whose moments the first fit was made of, so that nothing runs through the network
anew.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lowrank_jax.calibration.sums import row_sums
from lowrank_jax.compression.activations import Activation, by_row
from lowrank_jax.compression.holding import Holding, loaded
from lowrank_jax.compression.layer_fits import LayerFits
from lowrank_jax.compression.notes import trusted
from lowrank_jax.compression.outline import Outline
from lowrank_jax.compression.segments import FOLDS, Live, add_note
from lowrank_jax.program.compiler import default_options

AGAIN = 2  # fits; more gain little
ENOUGH = 0.97  # of the errors before a fit: where so many are left, another fit gains little
Array = np.ndarray
Notes = Sequence[Mapping[str, Any]]


class Sample:
    """Rows of what a layer reads and gives in every batch, and of what is added to that.

    Args:
        outline: of the program.
        place: of the layer's equation.
        activation: behind the layer.
        holding: keeps them.
    """

    def __init__(
        self, outline: Outline, place: int, activation: Activation, holding: Holding
    ) -> None:
        self.reading, self.activation = outline.readings[place], activation
        self._holding, self._kept = holding, list[Any]()
        # A method would hold the rows until the collector of cycles comes.
        notes = functools.partial(_notes, activation)
        self._program = jax.jit(notes, compiler_options=default_options())

    def added(self, live: Live) -> tuple:
        """What is added to the outputs of a batch in the dense and in the compressed network."""
        other = self.activation.other
        if other is None:
            return ()
        return live.dense[other], live.small.get(other, live.dense[other])

    def keep(self, rows: tuple[jax.Array, Sequence[jax.Array]]) -> None:
        """Keeps the rows of a batch: patches, then outputs and what is added to them."""
        self._kept.append(self._holding.keep(rows))

    def notes(self, kernel: jax.Array, lack: Float[Array, "n"], roots: jax.Array) -> list:
        """Sums over the rows of the even and of the odd batches, for the present kernels.

        Args:
            kernel: of the layer (S, g, p, m).
            lack: what a shift adds to its outputs.
            roots: of the importance of the outputs.
        """
        found: list[Any] = []
        for turn, rows in enumerate(self._kept):
            add_note(found, turn % FOLDS, self._program(loaded(rows), kernel, lack, roots))
        return found


def _notes(
    activation: Activation, rows: tuple, kernel: jax.Array, lack: jax.Array, roots: jax.Array
) -> dict[str, Any]:
    x, (dense, *others) = rows
    own = _product(x, kernel)
    own += by_row(lack, own.shape)
    wanted, errors = activation.wanted(dense, own, *others)
    sums = row_sums(x, wanted, roots)
    return {"sums": sums, "outputs": wanted.sum(0), "errors": (errors**2).sum(0)}


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rows (r, S, g, m) of the outputs of kernels (S, g, p, m)."""
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    if kernel.shape[:2] == (1, 1):
        return product("rp,pm->rm", x[:, 0, 0], kernel[0, 0])[:, None, None]
    return product("rsgp,sgpm->rsgm", jnp.broadcast_to(x, (len(x), *kernel.shape[:-1])), kernel)


def fit_again(
    layers: LayerFits,
    path: str,
    sample: Sample,
    first: Notes,
    lack: Float[Array, "n"],
    shifted: bool,
) -> Float[Array, "n"]:
    """Fits a layer again, as long as the errors that the activation shows fall.

    Args:
        layers: the fits so far, the layer's among them.
        path: of the layer.
        sample: its rows.
        first: the notes of its first fit.
        lack: what a shift adds to its outputs.
        shifted: whether a shift takes up the means of its outputs, and may add something else.

    Returns:
        What the shift is to add.
    """
    least, kept = math.inf, (list(layers.of(path)), lack)
    kernel, roots = layers.kernel(path, sample.reading), layers.roots(path)
    for _ in range(AGAIN):
        notes = sample.notes(kernel, lack, roots)
        error = layers.shown(path, notes)
        if error >= least:
            fits, lack = kept
            for index, fit in fits:
                layers.take(path, index, fit)
        if error >= ENOUGH * least:
            return lack
        least, kept = error, (list(layers.of(path)), lack)
        layers.fit(path, sample.reading, _beside(first, notes), shifted)
        kernel = layers.kernel(path, sample.reading)
        if shifted:
            lack = trusted(functools.partial(_lacking, np.asarray(kernel), lack.size), notes)
    return lack


def _beside(first: Notes, again: Notes) -> list[dict[str, Any]]:
    """Notes of a fit again, with what only the first ones have: moments of the same inputs."""
    pairs = zip(first, again, strict=True)
    return [{"sums": {**one["sums"], **two["sums"]}} for one, two in pairs]


def _lacking(kernel: Float[Array, "S g p m"], channels: int, found: Notes) -> Float[Array, "n"]:
    """What the means of the outputs lack beside those that are wanted."""
    x, wanted = (
        sum(own) for own in ([n["sums"]["x"] for n in found], [n["outputs"] for n in found])
    )
    own = np.einsum("sgp,sgpm->sgm", x, kernel)
    mean = (wanted - own) / sum(note["sums"]["count"][0] for note in found)
    return mean.reshape(-1, channels).mean(0)
