"""Compression of an NNX model with a little unlabelled data, without training."""

from typing import Any, TypeVar

from lowrank_jax.compression.walk import Walk, check_options
from lowrank_jax.nnx.calibrate import output_scales, set_statistics
from lowrank_jax.nnx.decompose import decompose, find_schemes, trace
from lowrank_jax.nnx.layers import by_path, find_layers
from lowrank_jax.nnx.separable import pair
from lowrank_jax.nnx.watch import evaluated, watched
from lowrank_jax.planning.selection import check_images, traced_on
from lowrank_jax.tree.decomposing import Ranks

Model = TypeVar("Model")


def compress(
    model: Model,
    images: Any,
    ranks: Ranks,
    *args: Any,
    sweeps: int = 1,
    batch_norm: str = "mean",
    **kwargs: Any,
) -> Model:
    """Makes a new model, decomposed so that its outputs, not its kernels, change least.

    The algorithm of `lowrank_jax.compress`: the dense network and the one being compressed run side
    by side, once, each layer is fitted at its first use to what the compressed network gives it,
    and means are matched. Transposed convolutions, dilated inputs and layers that run in a
    transformation, such as ``nnx.scan`` or ``nnx.jit``, have the factors of `decompose`. A bias
    that layers share stays as it is.

    Args:
        model: trained `nnx.Module`; it runs in evaluation and is not changed.
        images: calibration inputs, (batch, ...); all layers' activations of twice as many are held
            at a time.
        ranks: layer path to rank or `Separable`, as in `decompose`.
        *args, **kwargs: other arguments of the model's call.
        sweeps: alternating refinements of the two factors.
        batch_norm: "mean" to match the means, "full" to re-estimate means and variances, "keep" for
            neither.

    Returns:
        A model with `SeparableConv` in the places named, in the mode of the one given.

    Raises:
        ValueError: the table or an option cannot be used, the images are empty or of a shape that
            the model does not take, or the activations are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> compress(model, jnp.ones((4, 8, 8, 4)), {"layers/0": 3}).layers[0].vertical.kernel.shape
        (3, 1, 4, 3)
    """
    check_options(sweeps, batch_norm)
    images, still = check_images(images), evaluated(model)
    uses = traced_on(images, lambda images: trace(still, images, *args, **kwargs))
    schemes = find_schemes(*find_layers(still), ranks, uses)
    scales = output_scales(model, images[:1], *args, **kwargs)
    walk = Walk(images, schemes, scales, sweeps, batch_norm)
    watched(model, walk)(walk.inputs, *args, **kwargs)
    small = decompose(model, schemes)
    _fill(small, walk)
    return small


def _fill(model: Any, walk: Walk) -> None:
    """Gives a decomposed model what the walk found."""
    nodes = by_path(model)
    for path, kernels in walk.kernels.items():
        for conv, kernel in zip(pair(nodes[path]), kernels, strict=True):
            conv.kernel.set_value(kernel)
    for path, bias in walk.biases.items():
        pair(nodes[path])[1].bias.set_value(bias)
    set_statistics(model, walk.statistics)
