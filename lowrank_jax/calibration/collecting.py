"""One pass of a Linen model over unlabelled data: what every convolution sees, statistics of batch
normalisation."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.calibration.moments import Moments
from lowrank_jax.calibration.observe import (
    Averages,
    Gather,
    Layer,
    Norm,
    Observer,
    Scales,
    split_input,
)
from lowrank_jax.program.factored import run_factored


def calibrate(
    apply: Callable,
    variables: Any,
    batches: Iterable[Any],
    paths: Sequence[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Moments]:
    """Gathers the second moments of the inputs and outputs of every `nn.Conv` of a Linen model.

    Streams: one batch is held at a time, and the moments of each layer. A layer that runs inside a
        lifted
    transformation, such as ``nn.scan``, or has dilated inputs is left out.

    Args:
        apply: ``model.apply``, or a function that calls it.
        variables: trained variables.
        batches: arrays of inputs, (batch, ...).
        paths: the layers wanted; all if None.
        *args, **kwargs: other arguments of ``apply``, in evaluation.

    Returns:
        Layer path to its moments, summed over all its uses.

    Raises:
        ValueError: there is no data, or the activations are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu]), jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> calibrate(model.apply, variables, [images])["layers_0"].covariance.shape
        (1, 36, 36)
    """
    gather, empty = Gather(paths), True
    with watch(gather):
        for batch in batches:
            apply(variables, jnp.asarray(batch), *args, **kwargs)
            empty = False
    if empty:
        raise ValueError("No calibration data: give at least one batch of inputs.")
    return gather.found


def output_scales(
    apply: Callable, variables: Any, images: Any, *args: Any, **kwargs: Any
) -> dict[str, np.ndarray]:
    """How much each output channel of a convolution counts: the factor of the batch normalisation
    after it.

    Returns:
        Path of every convolution whose output goes straight into an `nn.BatchNorm`, to |scale| /
        deviation.
    """
    scales = Scales()
    with watch(scales):
        apply(variables, images, *args, **kwargs)
    return scales.found


def reestimate(
    apply: Callable, variables: Any, batches: Iterable[Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Sets the statistics of every `nn.BatchNorm` to those of the data, by forward passes alone.

    Means and variances are cumulative over the batches, each layer seeing what the layers before it
    give when they normalise by the batch at hand.

    Args:
        apply: ``model.apply`` or `lowrank` of it.
        variables: variables whose "batch_stats" are to be renewed.
        batches: arrays of inputs of equal size, (batch, ...).
        *args, **kwargs: arguments that make ``apply`` run in training mode, such as ``train=True``.

    Returns:
        The variables with new statistics, as a plain dict.

    Raises:
        ValueError: there is no data, the activations are not finite, or the model has no batch
            normalisation, or one within a lifted transformation.
    """
    variables = flax.core.unfreeze(variables)
    if not variables.get("batch_stats"):
        raise ValueError(
            "The variables hold no 'batch_stats': the model has no batch normalisation to re-estimate."
        )
    averages, count = Averages(), 0
    with watch(averages):
        for batch in batches:
            apply(variables, jnp.asarray(batch), *args, mutable=["batch_stats"], **kwargs)
            count += 1
    return {
        **variables,
        "batch_stats": with_statistics(variables["batch_stats"], averages.statistics(count)),
    }


def with_statistics(batch_stats: Any, new: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The collection with other values at some paths, in the types that it has."""
    flat = flatten_dict(batch_stats)
    for path, values in new.items():
        flat |= {
            key: jnp.asarray(values[key[-1]], flat[key].dtype)
            for key in (tree_key(path, x) for x in values)
        }
    return unflatten_dict(flat)


def tree_key(path: str, *names: str) -> tuple[str, ...]:
    """The key of a flattened tree below the layer at a path, which is "" for the model itself."""
    return (*path.split("/"), *names) if path else names


class LinenLayer(Layer):
    """An `nn.Conv` or `nn.ConvTranspose` whose call was intercepted."""

    def __init__(self, module: Any, path: str) -> None:
        params = module.variables["params"]
        self.module, self.path, self.kernel_path = module, path, path
        self.kernel, self.bias = params.get("kernel"), params.get("bias")
        self.measurable = (
            type(module) is nn.Conv and not module.conv_general_dilated and not _dilated(module)
        )

    def run(self, x: jax.Array, convolve: Callable) -> jax.Array:
        copy = self.module.clone(parent=None, name=None, conv_general_dilated=convolve)
        return copy.apply({"params": self.module.variables["params"]}, x)

    def factored(
        self, first: str, kernels: tuple, bias: jax.Array | None, x: jax.Array
    ) -> jax.Array:
        second = {"kernel": kernels[1]} | ({} if bias is None else {"bias": bias})
        return run_factored(self.module, first, [{"kernel": kernels[0]}, second], self.path, x)


def _dilated(layer: nn.Conv) -> bool:
    return bool(np.max(1 if layer.input_dilation is None else layer.input_dilation) > 1)


def _norm(module: nn.BatchNorm, path: str) -> Norm:
    mean: Any = module.get_variable("batch_stats", "mean")
    var: Any = module.get_variable("batch_stats", "var")
    scale = module.get_variable("params", "scale") if module.use_scale else None
    return Norm(path, mean, var, scale, module.epsilon, module.axis)


def watch(observer: Observer) -> AbstractContextManager:
    """A context in which an observer runs the convolutions and batch normalisations of all Linen
    models."""
    inside = False

    def step(call: Callable, args, kwargs, context) -> Any:
        nonlocal inside
        module, known = context.module, (nn.Conv, nn.ConvTranspose, nn.BatchNorm)
        # The observer runs copies of the layer, which are none of the model's.
        if (
            inside
            or type(module) not in known
            or context.method_name != "__call__"
            or module.scope is None
        ):
            return call(*args, **kwargs)
        x, rest, options = split_input(args, kwargs)
        inside = True
        try:
            return _observed(observer, module, x, lambda x: call(x, *rest, **options))
        finally:
            inside = False

    return nn.intercept_methods(step)


def _observed(observer: Observer, module: Any, x: jax.Array, run: Callable) -> jax.Array:
    path = "/".join(module.path)
    if type(module) is nn.BatchNorm:
        return observer.normalise(_norm(module, path), x, run)
    if not module.has_variable("params", "kernel"):
        return run(x)  # its parameters hold factors
    return observer.convolve(LinenLayer(module, path), x, run)
