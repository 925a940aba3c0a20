"""What a plan needs beside the network's framework: images, one budget, and the errors of the
outputs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lowrank_jax.calibration.moments import Moments
from lowrank_jax.factorization.fitting import whitened_spectrum
from lowrank_jax.factorization.separable import FACTORS
from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.spectra import Spectra, spectra
from lowrank_jax.program.kernel_use import Trace
from lowrank_jax.tree.decomposing import find_layer, layer_leaves

BATCH = 256


def check_images(images: Any) -> jax.Array:
    """The calibration images as an array, or an error if there are none."""
    images = jnp.asarray(images)
    if not images.ndim or not len(images):
        raise ValueError(
            f"No calibration data: images of shape {images.shape} are empty; give (batch, height, width, channels)."
        )
    return images


def traced_on(images: jax.Array, trace: Callable[[jax.Array], Trace]) -> Trace:
    """The trace of a model on the first image, or an error that names the images' shape."""
    try:
        return trace(images[:1])
    except (TypeError, ValueError, flax.errors.FlaxError) as error:
        raise ValueError(
            f"The model does not run on images of shape {images.shape}: {error}\nGive images of the shape that it is "
            "for, (batch, height, width, channels), and the arguments of its call for evaluation."
        ) from error


def batched(images: jax.Array) -> Iterator[jax.Array]:
    return (images[start : start + BATCH] for start in range(0, len(images), BATCH))


def several(images: jax.Array, count: int) -> jax.ShapeDtypeStruct:
    """The shape of a batch of so many images, for a trace."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"batch={count!r} is not allowed; give an int of 1 or more, how many images run at once."
        )
    return jax.ShapeDtypeStruct((count, *images.shape[1:]), images.dtype)


def one_budget(**given: int | float | None) -> Budget:
    """The budget of the one measure that is not None.

    Example:
        >>> one_budget(macs=0.5, parameters=None)
        Budget(measure='macs', amount=0.5)
    """
    budgets = [Budget(name, amount) for name, amount in given.items() if amount is not None]
    if len(budgets) != 1:
        raise ValueError(f"plan needs exactly one budget, {', '.join(given)}; got {len(budgets)}.")
    return budgets[0]


def whitened_spectra(
    params: chex.ArrayTree,
    uses: Trace,
    seen: Mapping[str, Moments],
    scales: Mapping[str, np.ndarray] | None = None,
) -> Spectra:
    """Singular values of the layers in which a rank leaves out what their outputs lose.

    Args:
        params: parameters of the dense model.
        uses: trace of the model.
        seen: moments of the layers, from `calibrate`; a safe layer without them has its plain
            spectrum.
        scales: importance of the output channels, from `output_scales`.
    """
    layers = layer_leaves(flatten_dict(params))
    values: dict[str, Mapping[str, np.ndarray]] = {}
    for path in uses.safe_paths():
        use = uses.at(path)[0]
        if path not in seen:
            values |= spectra(params, uses, [path]).values
            continue
        kernel = np.asarray(layers[find_layer(path, layers)]["kernel"], np.float64)
        scale = (scales or {}).get(path)
        values[path] = {
            first: whitened_spectrum(kernel, seen[path], use.scheme(1, first), scale)
            for first in FACTORS
        }
    return Spectra(values)
