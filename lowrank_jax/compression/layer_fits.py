"""The fits of the layers so far, and their factors."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.network import Network
from lowrank_jax.compression.holding import give_back
from lowrank_jax.compression.kernels import Factors, Slice
from lowrank_jax.compression.notes import folds_of
from lowrank_jax.compression.outline import slices
from lowrank_jax.factorization.axes import OUTPUTS, only, patch_axes, width_of
from lowrank_jax.factorization.fitting import Fit, fit_again, fit_layer
from lowrank_jax.factorization.importance import Importance
from lowrank_jax.factorization.layout import merged
from lowrank_jax.factorization.merging import multiplied
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.whole import fit_whole
from lowrank_jax.program.reading import Reading


class LayerFits:
    """Fits layers, and keeps what it finds.

    Args:
        network: the dense network.
        schemes: layer path to its scheme.
        kept: the same of layers that stay dense.
        importance: layer path to how much errors of its outputs count; all alike without.
        sweeps: alternating refinements of the two factors.

    Attributes:
        factors: of all layers.
        fits: layer path and index in its stack to the fit of a kernel.
    """

    def __init__(
        self,
        network: Network,
        schemes: Mapping[str, Scheme],
        kept: Mapping[str, Scheme],
        importance: Mapping[str, Importance],
        sweeps: int,
    ) -> None:
        self.schemes, self.kept, self.sweeps = {**schemes, **kept}, kept, sweeps
        self.factors = Factors(network, self.schemes, kept)
        self.fits: dict[str, dict[Slice, Fit]] = {}
        own = {path: importance.get(path) for path in schemes}
        self._importance = {path: self._within(path, own.get(path)) for path in self.schemes}

    def _within(self, path: str, importance: Importance | None) -> Importance:
        scheme = self.schemes[path]
        outputs = width_of(scheme.axes, self.factors.stored[path].shape)
        return (importance or Importance.even(outputs)).within(scheme.groups)

    def roots(self, path: str) -> jax.Array:
        """What weighs the outputs of a layer; see `Importance`."""
        return jnp.asarray(self._importance[path].roots)

    def lacks(self, path: str, reading: Reading) -> bool:
        """Whether a reading has kernels that are not fitted."""
        return not set(slices(reading)) <= set(self.fits.get(path, {}))

    def of(self, path: str) -> Iterator[tuple[Slice, Fit]]:
        """The fits of a layer, by the index in its stack."""
        yield from self.fits.get(path, {}).items()

    def fit(self, path: str, reading: Reading, found: Sequence[Mapping], centred: bool) -> None:
        """Fits the kernels of a reading to the notes of all batches, or fits them again.

        Args:
            path: of the layer.
            reading: of its kernels.
            found: the notes of each set of images.
            centred: whether something behind the layer takes up the means of its outputs.
        """
        folds, known = folds_of(found, path, centred), dict(self.of(path))
        for number, index in enumerate(slices(reading)):
            kernel = np.asarray(self.factors.stored[path][index], np.float64)
            given = kernel, [fold[number] for fold in folds], self.schemes[path]
            importance, old = self._importance[path], known.get(index)
            if path in self.kept:
                fit = fit_whole(*given, old)
            elif old is None:
                fit = fit_layer(*given, importance, self.sweeps)
            else:
                fit = fit_again(*given, importance, old, self.sweeps)
            self.take(path, index, fit)
        give_back()

    def take(self, path: str, index: Slice, fit: Fit) -> None:
        """Gives a kernel the factors of a fit."""
        self.fits.setdefault(path, {})[index] = fit
        self.factors.fill(path, index, np.asarray(fit.first), np.asarray(fit.second))

    def supported(self, path: str) -> bool:
        """Whether the data support a fit of every kernel of a layer."""
        return not any(fit.is_plain for _, fit in self.of(path))

    def shown(self, path: str, found: Sequence[Mapping]) -> float:
        """The errors of a layer that notes show, each channel by what errors of it cost."""
        cost = self._importance[path].diagonal
        errors = np.sum([note["errors"] for note in found], axis=0)
        return float(np.sum(errors.reshape(-1, cost.size) @ cost))

    def kernel(self, path: str, reading: Reading) -> jax.Array:
        """The kernels of a reading (S, g, p, m), as its patches are laid out."""
        scheme, fits = self.schemes[path], dict(self.of(path))
        axes = scheme.axes
        parts = [patch_axes(axes, scheme.first)[0], only(axes, OUTPUTS)]
        found = []
        for index in slices(reading):
            whole = multiplied(fits[index].first, fits[index].second, axes)
            rows = merged(whole, axes, parts)
            found.append(rows.reshape(len(rows), reading.groups, -1).swapaxes(0, 1))
        return jnp.asarray(np.stack(found), jnp.float32)
