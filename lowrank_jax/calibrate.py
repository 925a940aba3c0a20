"""One pass over unlabelled data: what every convolution sees, and the statistics of batch normalisation."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.compiling import training_options
from lowrank_jax.matricize import AXES
from lowrank_jax.moments import Geometry, Moments, moments


def calibrate(
    apply: Callable,
    variables: Any,
    batches: Iterable[Any],
    paths: Sequence[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Moments]:
    """Gathers the second moments of the inputs and outputs of every `nn.Conv` of a Linen model.

    Streams: one batch is held at a time, and the moments of each layer. A layer that runs inside a lifted
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
    found: dict[str, Moments] = {}

    def step(call, args, kwargs, context):
        layer = context.module
        if type(layer) is not nn.Conv or context.method_name != "__call__" or isinstance(args[0], jax.core.Tracer):
            return call(*args, **kwargs)
        path = "/".join(layer.path)
        if (paths is not None and path not in paths) or layer.conv_general_dilated or _dilated(layer):
            return call(*args, **kwargs)
        outputs, seen = spy(layer, args[0])
        new = moments(seen.inputs, seen.outputs, seen.geometry)
        found[path] = found[path] + new if path in found else new
        return outputs

    empty = True
    with nn.intercept_methods(step):
        for batch in batches:
            apply(variables, jnp.asarray(batch), *args, **kwargs)
            empty = False
    if empty:
        raise ValueError("No calibration data: give at least one batch of inputs.")
    return found


def _dilated(layer: nn.Conv) -> bool:
    dilation = layer.input_dilation
    return bool(np.max(1 if dilation is None else dilation) > 1)


def output_scales(apply: Callable, variables: Any, images: Any, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """How much each output channel of a convolution counts: the factor of the batch normalisation after it.

    Returns:
        Path of every convolution whose output goes straight into an `nn.BatchNorm`, to |scale| / deviation.
    """
    found: dict[str, np.ndarray] = {}
    last: dict[str, Any] = {}

    def step(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if type(context.module) is nn.Conv and context.method_name == "__call__":
            last.update(path="/".join(context.module.path), output=result)
        if type(context.module) is nn.BatchNorm and args and last and args[0] is last["output"]:
            found[last["path"]] = _scale(context.module)
        return result

    with nn.intercept_methods(step):
        apply(variables, images, *args, **kwargs)
    return found


def _scale(norm: nn.BatchNorm) -> np.ndarray:
    variance = np.asarray(norm.get_variable("batch_stats", "var"), np.float64)
    scale = np.asarray(norm.get_variable("params", "scale"), np.float64) if norm.use_scale else 1.0
    return np.abs(scale) / np.sqrt(variance + norm.epsilon)


def reestimate(apply: Callable, variables: Any, batches: Iterable[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Sets the statistics of every `nn.BatchNorm` to those of the data, by forward passes alone.

    Means and variances are cumulative over the batches, each layer seeing what the layers before it give when
    they normalise by the batch at hand.

    Args:
        apply: ``model.apply`` or `lowrank` of it.
        variables: variables whose "batch_stats" are to be renewed.
        batches: arrays of inputs of equal size, (batch, ...).
        *args, **kwargs: arguments that make ``apply`` run in training mode, such as ``train=True``.

    Returns:
        The variables with new statistics, as a plain dict.

    Raises:
        ValueError: there is no data, or the model has no batch normalisation.
    """
    variables = flax.core.unfreeze(variables)
    if not variables.get("batch_stats"):
        raise ValueError("The variables hold no 'batch_stats': the model has no batch normalisation to re-estimate.")
    sums: dict[tuple, Any] = {}
    count = 0
    with nn.intercept_methods(_record(sums)):
        for batch in batches:
            apply(variables, jnp.asarray(batch), *args, mutable=["batch_stats"], **kwargs)
            count += 1
    if not count:
        raise ValueError("No calibration data: give at least one batch of inputs.")
    flat = flatten_dict(variables["batch_stats"])
    for path, (mean, square) in sums.items():
        new = {"mean": mean / count, "var": square / count - (mean / count) ** 2}
        flat |= {(*path, name): jnp.asarray(value, flat[(*path, name)].dtype) for name, value in new.items()}
    return {**variables, "batch_stats": unflatten_dict(flat)}


def _record(sums: dict[tuple, Any]) -> Callable:
    def step(call, args, kwargs, context):
        if type(context.module) is nn.BatchNorm and context.method_name == "__call__":
            x = np.asarray(args[0], np.float64)
            axes, path = tuple(range(x.ndim - 1)), context.module.path
            old = sums.get(path, (0.0, 0.0))
            sums[path] = (old[0] + x.mean(axes), old[1] + np.square(x).mean(axes))
        return call(*args, **kwargs)

    return step


class Seen:
    inputs: jax.Array
    outputs: jax.Array
    geometry: Geometry


def spy(layer: Any, x: jax.Array) -> tuple[jax.Array, Seen]:
    """Runs a convolution layer and notes what reaches the convolution itself, after padding by the layer."""
    seen = Seen()

    def convolve(inputs, kernel, strides, padding, lhs_dilation=None, rhs_dilation=None, **options):
        if lhs_dilation and max(lhs_dilation) > 1:
            raise ValueError(
                f"{'/'.join(layer.path)}: calibration of dilated inputs is not known; leave the layer out."
            )
        groups = options.get("feature_group_count", 1)
        seen.inputs, seen.geometry = inputs, Geometry.of(inputs, kernel, strides, padding, rhs_dilation, groups)
        seen.outputs = _convolution(seen.geometry)(inputs, kernel)
        return seen.outputs

    copy = layer.clone(parent=None, name=None, conv_general_dilated=convolve)
    return copy.apply({"params": layer.variables["params"]}, x), seen


@functools.cache  # a new function for every call would be compiled anew for every call
def _convolution(geometry: Geometry) -> Callable[[jax.Array, jax.Array], jax.Array]:
    spatial = AXES[len(geometry.size)][:-2]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=geometry.strides,
        padding=geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=numbers,
        feature_group_count=geometry.groups,
    )
    return jax.jit(convolve, compiler_options=training_options())
