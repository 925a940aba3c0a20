"""From a model, a little unlabelled data and a budget to a plan."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import flax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lowrank_jax.budget import Budget
from lowrank_jax.calibrate import calibrate, output_scales
from lowrank_jax.decompose import find_layer, layer_leaves
from lowrank_jax.fitting import whitened_spectrum
from lowrank_jax.moments import Moments
from lowrank_jax.options import options
from lowrank_jax.plan import Plan
from lowrank_jax.ranks import total_energy
from lowrank_jax.schemes import FACTORS
from lowrank_jax.spectra import Spectra, spectra
from lowrank_jax.trace import trace
from lowrank_jax.uses import Trace

BATCH = 256


def plan(
    apply: Callable,
    variables: Any,
    images: Any,
    *args: Any,
    macs: int | float | None = None,
    weights: int | float | None = None,
    bytes: int | float | None = None,
    multiple: int = 1,
    select: Callable = total_energy,
    **kwargs: Any,
) -> Plan:
    """Chooses the rank of every layer of a Linen model within a budget, by what its outputs lose on data.

    Args:
        apply: ``model.apply``, or a function that calls it.
        variables: trained variables, "params" and others.
        images: unlabelled inputs (batch, ...); costs are those of one of them.
        *args, **kwargs: other arguments of ``apply``, in evaluation.
        macs, weights, bytes: the budget, exactly one of them; a float up to 1 is a share of the dense network's, an
            int is absolute.
        multiple: ranks are restricted to multiples of it.
        select: a selector of `lowrank_jax.ranks` that takes options and a budget.

    Returns:
        The plan; it prints as a table, and ``plan.ranks`` is the table for `decompose` and `compress`.

    Raises:
        ValueError: not one budget, a budget below the least possible, or no layer that can be decomposed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(16, (3, 3))]), jax.random.normal(jax.random.key(1), (4, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), images)
        >>> chosen = plan(model.apply, variables, images, macs=0.5)
        >>> chosen.ranks["layers_0"].rank, chosen.total("multiply_adds")
        (8, (73728, 36864))
    """
    given = {"multiply_adds": macs, "weights": weights, "bytes": bytes}
    budgets = [Budget(measure, amount) for measure, amount in given.items() if amount is not None]
    if len(budgets) != 1:
        raise ValueError(f"plan needs exactly one budget, macs, weights or bytes; got {len(budgets)}.")
    variables = flax.core.unfreeze(variables)
    images = jnp.asarray(images)
    uses = trace(apply, variables, images[:1], *args, **kwargs)
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    seen = calibrate(apply, variables, batches, uses.safe_paths(), *args, **kwargs)
    scales = output_scales(apply, variables, images[:1], *args, **kwargs)
    found = whitened_spectra(variables["params"], uses, seen, scales)
    return select(options(uses, found, multiple), budgets[0])


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
        seen: moments of the layers, from `calibrate`; a safe layer without them has its plain spectrum.
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
        values[path] = {first: whitened_spectrum(kernel, seen[path], use.scheme(1, first), scale) for first in FACTORS}
    return Spectra(values)
