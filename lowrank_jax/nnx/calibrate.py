"""One pass of an NNX model over unlabelled data: what convolutions see, statistics of batch
normalisation."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowrank_jax.calibration.moments import Moments
from lowrank_jax.calibration.observe import Averages, Gather, Scales
from lowrank_jax.nnx.layers import by_path
from lowrank_jax.nnx.watch import watched

Model = TypeVar("Model")


def calibrate(
    model: Any,
    batches: Iterable[Any],
    paths: Sequence[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> dict[str, Moments]:
    """Gathers the second moments of the inputs and outputs of every `nnx.Conv`, as
    `lowrank_jax.calibrate` does.

    Args:
        model: it runs in evaluation and is not changed.
        batches: arrays of inputs, (batch, ...).
        paths: the layers wanted; all if None. A kernel that layers share has the first of their
            paths.
        *args, **kwargs: other arguments of the model's call.

    Raises:
        ValueError: there is no data, or the activations are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> calibrate(model, [jnp.ones((4, 8, 8, 4))])["layers/0"].covariance.shape
        (1, 36, 36)
    """
    gather = Gather(paths)
    if not _run(watched(model, gather), batches, args, kwargs):
        raise ValueError("No calibration data: give at least one batch of inputs.")
    return gather.found


def output_scales(model: Any, images: Any, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    """How much each output channel of a convolution counts: the factor of the batch normalisation
    after it.

    Returns:
        Path of every convolution whose output goes straight into an `nnx.BatchNorm`, to |scale| /
        deviation.
    """
    scales = Scales()
    watched(model, scales)(images, *args, **kwargs)
    return scales.found


def reestimate(model: Model, batches: Iterable[Any], *args: Any, **kwargs: Any) -> Model:
    """Makes a new model in which every `nnx.BatchNorm` has the statistics of the data, by forward
    passes alone.

    Means and variances are cumulative over the batches, each layer seeing what the layers before it
    give when they normalise by the batch at hand. All else, such as dropout, is in evaluation.

    Args:
        model: dense or decomposed; it is not changed, nor is the mode that it is in.
        batches: arrays of inputs of equal size, (batch, ...).
        *args, **kwargs: other arguments of the model's call.

    Raises:
        ValueError: there is no data, the activations are not finite, or the model has no batch
            normalisation, or one within a transformation such as ``nnx.scan``.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> reestimate(model, [3 * jnp.ones((2, 8, 8, 4))]).layers[0].mean[...].tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    averages = Averages()
    count = _run(watched(model, averages, training=True), batches, args, kwargs)
    statistics = averages.statistics(count)
    if not statistics:
        raise ValueError(
            f"The {type(model).__name__} ran no nnx.BatchNorm: there are no statistics to re-estimate."
        )
    new = nnx.clone(model)
    set_statistics(new, statistics)
    return new


def set_statistics(model: Any, new: dict[str, dict[str, Any]]) -> None:
    """Changes the model's batch normalisations at some paths, in the types that they have."""
    nodes = by_path(model)
    for path, values in new.items():
        for name, value in values.items():
            variable = getattr(nodes[path], name)
            variable.set_value(jnp.asarray(value, variable.get_value().dtype))


def _run(model: Any, batches: Iterable[Any], args: tuple, kwargs: dict[str, Any]) -> int:
    """Runs a model for what it notes, and counts the batches."""
    count = 0
    for batch in batches:
        model(jnp.asarray(batch), *args, **kwargs)
        count += 1
    return count
