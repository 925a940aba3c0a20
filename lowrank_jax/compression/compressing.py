"""Compression of a Linen model with a little unlabelled data, without training."""

from collections.abc import Callable
from typing import Any

import flax
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from lowrank_jax.calibration.collecting import output_scales, tree_key, watch, with_statistics
from lowrank_jax.compression.walk import Walk, check_options
from lowrank_jax.factorization.separable import FACTORS, Separable
from lowrank_jax.planning.selection import check_images, traced_on
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.program.tracing import trace
from lowrank_jax.tree.decomposing import (
    Ranks,
    choose,
    decompose,
    find_layer,
    find_scheme,
    layer_leaves,
)


def compress(
    apply: Callable,
    variables: Any,
    images: Any,
    ranks: Ranks,
    *args: Any,
    sweeps: int = 1,
    batch_norm: str = "mean",
    **kwargs: Any,
) -> dict[str, Any]:
    """Decomposes the layers of a table so that the network's outputs, not its kernels, change
    least.

    The dense network and the one being compressed run side by side, once. At each decomposed layer
    the factors are fitted, in closed form, to give the dense network's outputs from the inputs that
    the compressed network has there, so that later layers make up for the errors of earlier ones.
    The means of what enters a batch normalisation, and biases of decomposed layers, are set to
    those of the dense network. Nothing is trained. Transposed convolutions, dilated inputs and
    layers in lifted transformations have the factors of `decompose`.

    Args:
        apply: ``model.apply`` of a Linen model, or a function that calls it.
        variables: trained variables of the dense model.
        images: calibration inputs, (batch, ...); all layers' activations of twice as many are held
            at a time.
        ranks: layer path to rank or `Separable`, as in `decompose`.
        *args, **kwargs: other arguments of ``apply``, in evaluation.
        sweeps: alternating refinements of the two factors.
        batch_norm: "mean" to match the means, "full" to re-estimate means and variances, "keep" for
            neither.

    Returns:
        Variables for `lowrank(apply)`, a plain nested dict.

    Raises:
        ValueError: the table or an option cannot be used, the images are empty or of a shape that
            the model does not take, or the activations are not finite.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu]), jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> compress(model.apply, variables, images, {"layers_0": 3})["params"]["layers_0"]["vertical"]["kernel"].shape
        (3, 1, 4, 3)
    """
    check_options(sweeps, batch_norm)
    variables, images = flax.core.unfreeze(variables), check_images(images)
    uses = traced_on(images, lambda images: trace(apply, variables, images, *args, **kwargs))
    schemes = _schemes(variables["params"], choose(ranks, uses), uses)
    scales = output_scales(apply, variables, images[:1], *args, **kwargs)
    walk = Walk(images, schemes, scales, sweeps, batch_norm)
    with watch(walk):
        apply(variables, walk.inputs, *args, **kwargs)
    return _result(variables, walk)


def _schemes(params: Any, ranks: Ranks, uses: Trace) -> dict[str, Separable]:
    layers = layer_leaves(flatten_dict(params))
    kernels = {path: layers[find_layer(path, layers)]["kernel"] for path in ranks}
    return {
        path: find_scheme(path, value, kernels[path], "HWIO", uses) for path, value in ranks.items()
    }


def _result(variables: dict[str, Any], walk: Walk) -> dict[str, Any]:
    flat: dict[tuple, jax.Array] = flatten_dict(
        decompose(variables["params"], walk.schemes), keep_empty_nodes=True
    )
    for path, kernels in walk.kernels.items():
        names = FACTORS[walk.schemes[path].first]
        flat |= {
            tree_key(path, name, "kernel"): kernel
            for name, kernel in zip(names, kernels, strict=True)
        }
    for path, bias in walk.biases.items():
        flat[tree_key(path, FACTORS[walk.schemes[path].first][1], "bias")] = bias
    new = {**variables, "params": unflatten_dict(flat)}
    stats = variables.get("batch_stats")
    return {**new, "batch_stats": with_statistics(stats, walk.statistics)} if stats else new
