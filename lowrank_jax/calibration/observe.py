"""What is noted while a network runs on unlabelled data, in whichever framework it is written.

A framework hands each call of a convolution and of a batch normalisation to an `Observer`, which
runs it, or something in its place. `lowrank_jax.calibrate` does so for Linen,
`lowrank_jax.nnx.watch` for NNX.
"""

import abc
import functools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.moments import Geometry, Moments, moments
from lowrank_jax.factorization.layout import AXES
from lowrank_jax.program.compiler import default_options

Run = Callable[[jax.Array], jax.Array]


class Layer(abc.ABC):
    """A convolution layer at work, as each framework presents its own.

    Attributes:
        path: of the layer.
        kernel_path: of the layer that names the kernel in tables; another one's where layers share
            a kernel.
        kernel: in Flax's layout.
        bias: None if there is none that may be moved.
        measurable: whether it cuts plain patches from its inputs: no transposed convolution, no
            dilated inputs.
    """

    path: str
    kernel_path: str
    kernel: jax.Array
    bias: jax.Array | None
    measurable: bool

    @abc.abstractmethod
    def run(self, x: jax.Array, convolve: Callable) -> jax.Array:
        """The layer as it is, but with another convolution function."""

    @abc.abstractmethod
    def factored(
        self, first: str, kernels: tuple, bias: jax.Array | None, x: jax.Array
    ) -> jax.Array:
        """The layer with two kernels in place of its own, and with another bias if one is given."""

    def check_batch(self, x: jax.Array, count: int = 1) -> None:
        """Raises ValueError unless the inputs have a multiple of ``count`` images along the first
        axis."""
        if x.ndim < self.kernel.ndim or len(x) % count:
            raise ValueError(
                f"{self.path}: its inputs of shape {x.shape} do not have the images along the first axis; give images "
                "of shape (batch, height, width, channels) to a model that keeps the batch first."
            )


class Norm(NamedTuple):
    """A batch normalisation at work; ``scale`` is None if it has none."""

    path: str
    mean: Any
    var: Any
    scale: Any
    epsilon: float
    axis: Any

    def channels_last(self, x: jax.Array) -> bool:
        return self.axis in (-1, x.ndim - 1, (-1,), (x.ndim - 1,))

    def check_axis(self, x: jax.Array) -> None:
        if not self.channels_last(x):
            raise ValueError(
                f"{self.path}: axis={self.axis} is not known here, only channels last, axis=-1; transpose the "
                "activations in the model, or call compress with batch_norm='keep'."
            )


class Observer:
    """Runs what it is handed, as it is."""

    def convolve(self, layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        return run(x)

    def normalise(self, norm: Norm, x: jax.Array, run: Run) -> jax.Array:
        return run(x)


class Gather(Observer):
    """Sums the moments of the inputs and outputs of convolutions over all that they are given.

    Attributes:
        found: kernel path to its moments.
    """

    def __init__(self, paths: Collection[str] | None = None) -> None:
        self.paths = paths
        self.found: dict[str, Moments] = {}

    def convolve(self, layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        path = layer.kernel_path
        wanted = self.paths is None or path in self.paths
        if not wanted or not layer.measurable or isinstance(x, jax.core.Tracer):
            return run(x)
        layer.check_batch(x)
        spy = Spy()
        outputs = layer.run(x, spy)
        new = spy.moments(layer.path, spy.outputs)
        self.found[path] = self.found[path] + new if path in self.found else new
        return outputs


class Scales(Observer):
    """Notes how much each output channel of a convolution counts: the factor of the normalisation
    right after it.

    Attributes:
        found: kernel path to |scale| / deviation.
    """

    def __init__(self) -> None:
        self.found: dict[str, np.ndarray] = {}
        self._last: tuple[str, Any] = ("", None)

    def convolve(self, layer: Layer, x: jax.Array, run: Run) -> jax.Array:
        self._last = layer.kernel_path, run(x)
        return self._last[1]

    def normalise(self, norm: Norm, x: jax.Array, run: Run) -> jax.Array:
        if (
            x is self._last[1]
            and not isinstance(norm.var, jax.core.Tracer)
            and norm.channels_last(x)
        ):
            scale = 1.0 if norm.scale is None else np.asarray(norm.scale, np.float64)
            self.found[self._last[0]] = np.abs(scale) / np.sqrt(
                np.asarray(norm.var, np.float64) + norm.epsilon
            )
        return run(x)


class Averages(Observer):
    """Sums, over batches, the mean and the mean square of what enters each batch normalisation."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}

    def normalise(self, norm: Norm, x: jax.Array, run: Run) -> jax.Array:
        norm.check_axis(x)
        if isinstance(x, jax.core.Tracer):
            raise ValueError(
                f"{norm.path}: a batch normalisation within a transformation cannot be re-estimated by itself; "
                "run the model in training mode on the data instead."
            )
        values, axes = np.asarray(x, np.float64), tuple(range(x.ndim - 1))
        old = self._sums.get(norm.path, (0.0, 0.0))
        self._sums[norm.path] = (old[0] + values.mean(axes), old[1] + np.square(values).mean(axes))
        return run(x)

    def statistics(self, count: int) -> dict[str, dict[str, np.ndarray]]:
        """Path to "mean" and "var", by name, after a number of batches."""
        if not count:
            raise ValueError("No calibration data: give at least one batch of inputs.")
        found = {}
        for path, (mean, square) in self._sums.items():
            if not np.isfinite(square).all():
                raise ValueError(
                    f"{path}: the activations hold NaN or infinite values; check weights and images."
                )
            found[path] = {"mean": mean / count, "var": square / count - (mean / count) ** 2}
        return found


class Spy:
    """A convolution function that notes what reaches the convolution itself, after padding by the
    layer.

    Attributes:
        inputs, outputs, geometry: of the last call; without ``compute`` the outputs are zeros.
    """

    inputs: jax.Array
    outputs: jax.Array
    geometry: Geometry

    def __init__(self, compute: bool = True) -> None:
        self.compute = compute

    def __call__(
        self, inputs, kernel, strides, padding, lhs_dilation=None, rhs_dilation=None, **options
    ) -> jax.Array:
        groups = options.get("feature_group_count", 1)
        self.inputs, self.geometry = (
            inputs,
            Geometry.of(inputs, kernel, strides, padding, rhs_dilation, groups),
        )
        convolve = _convolution(
            self.geometry, options.get("precision"), options.get("preferred_element_type")
        )
        if self.compute:
            self.outputs = convolve(inputs, kernel)
        else:
            shape = jax.eval_shape(convolve, inputs, kernel)
            self.outputs = jnp.zeros(shape.shape, shape.dtype)
        return self.outputs

    def moments(self, path: str, outputs: jax.Array) -> Moments:
        """Those of the inputs with the outputs that are to be given."""
        try:
            return moments(self.inputs, outputs, self.geometry)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@functools.cache  # a new function for every call would be compiled anew for every call
def _convolution(
    geometry: Geometry, precision: Any, dtype: Any
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    spatial = AXES[len(geometry.size)][:-2]
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=geometry.strides,
        padding=geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=geometry.groups,
        precision=precision,
        preferred_element_type=dtype,
    )
    return jax.jit(convolve, compiler_options=default_options())


def split_input(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict[str, Any]]:
    """The input of a layer, be it given by position or by name, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = "inputs" if "inputs" in kwargs else "x"  # of convolutions and of normalisations
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}
