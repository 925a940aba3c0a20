"""One walk through a network that fits every layer to what it will see: the algorithm of
`compress`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.observe import Layer, Norm, Observer, Run, Spy
from lowrank_jax.factorization.fitting import fit_layer
from lowrank_jax.factorization.separable import Separable

BATCH_NORM = ("mean", "full", "keep")


def check_options(sweeps: Any, batch_norm: Any) -> None:
    """Raises ValueError if `compress` does not know an option."""
    if batch_norm not in BATCH_NORM:
        raise ValueError(
            f"batch_norm={batch_norm!r} is not allowed; give 'mean', 'full' or 'keep'."
        )
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise ValueError(f"sweeps={sweeps!r} is not allowed; give an int of 0 or more.")


class Walk(Observer):
    """Runs the dense network on the first half of a batch and the compressed one on the second.

    Each layer is fitted at its first use. What a transformation runs cannot be measured and has
    plain factors.

    Attributes:
        kernels: kernel path to the two fitted kernels; layers with plain factors are not among
            them.
        biases: layer path to the bias that gives the dense network's means.
        statistics: path of a batch normalisation to its new "mean" and "var".
    """

    def __init__(
        self,
        images: jax.Array,
        schemes: Mapping[str, Separable],
        scales: Mapping,
        sweeps: int,
        batch_norm: str,
    ) -> None:
        self.inputs = jnp.concatenate([images, images])
        self.schemes, self.scales, self.sweeps, self.batch_norm = (
            schemes,
            scales,
            sweeps,
            batch_norm,
        )
        self.kernels: dict[str, tuple[jax.Array, jax.Array]] = {}
        self.plain: set[str] = set()  # what stays so, because it ran so already
        self.biases: dict[str, jax.Array] = {}
        self.statistics: dict[str, dict[str, jax.Array]] = {}

    def convolve(self, layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        if layer.kernel_path not in self.schemes:
            return run(x)
        layer.check_batch(x, len(self.inputs))
        old, new = x[: len(x) // 2], x[len(x) // 2 :]
        if isinstance(x, jax.core.Tracer) or not layer.measurable:
            return jnp.concatenate([run(old), self._low(layer, new)])
        spy = Spy()
        dense = layer.run(old, spy)
        if layer.kernel_path not in self.kernels and layer.kernel_path not in self.plain:
            self.kernels[layer.kernel_path] = self._fit(layer, spy.outputs, new)
        if layer.bias is not None and layer.path not in self.biases:
            self.biases[layer.path] = self._shift(layer, dense, new)
        return jnp.concatenate([dense, self._low(layer, new)])

    def _low(self, layer: Layer, x: jax.Array) -> jax.Array:
        path = layer.kernel_path
        scheme, kernels = self.schemes[path], self.kernels.get(path)
        if kernels is None:
            self.plain.add(path)
            kernels = scheme.factor(layer.kernel)
        return layer.factored(scheme.first, kernels, self.biases.get(layer.path, layer.bias), x)

    def _fit(self, layer: Layer, wanted: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        spy, path = Spy(compute=False), layer.kernel_path
        layer.run(x, spy)
        kernel, found = np.asarray(layer.kernel, np.float64), spy.moments(layer.path, wanted)
        first, second = fit_layer(
            kernel, found, self.schemes[path], self.scales.get(path), self.sweeps
        )
        return first.astype(layer.kernel.dtype), second.astype(layer.kernel.dtype)

    def _shift(self, layer: Layer, dense: jax.Array, x: jax.Array) -> jax.Array:
        """The bias with which the means of the outputs are those of the dense layer."""
        assert layer.bias is not None
        low = self._low(layer, x)
        axes = tuple(range(low.ndim - 1))
        shift = dense.astype(jnp.float32).mean(axes) - low.astype(jnp.float32).mean(axes)
        return (layer.bias + shift).astype(layer.bias.dtype)

    def normalise(self, norm: Norm, x: jax.Array, run: Run) -> jax.Array:
        if self.batch_norm == "keep" or isinstance(x, jax.core.Tracer):
            return run(x)
        norm.check_axis(x)
        return run(self._align(norm, x))

    def _align(self, norm: Norm, x: jax.Array) -> jax.Array:
        """Moves the second half to where the new statistics would take it, and keeps these."""
        half, axes = len(x) // 2, tuple(range(x.ndim - 1))
        old, low = (part.astype(jnp.float32) for part in (x[:half], x[half:]))
        if self.batch_norm == "mean":
            mean, var = norm.mean + (low.mean(axes) - old.mean(axes)), norm.var
        else:
            mean, var = low.mean(axes), low.var(axes)
        self.statistics[norm.path] = {"mean": mean, "var": var}
        ratio = jnp.sqrt((norm.var + norm.epsilon) / (var + norm.epsilon))
        return jnp.concatenate([x[:half], ((low - mean) * ratio + norm.mean).astype(x.dtype)])
