"""From a Linen model, a little unlabelled data and a budget to a plan."""

from collections.abc import Callable
from typing import Any

import flax

from lowrank_jax.calibration.collecting import calibrate, output_scales
from lowrank_jax.planning.candidates import candidates
from lowrank_jax.planning.measured import timed
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.selection import batched, check_images, one_budget, several, traced_on
from lowrank_jax.planning.selection import whitened_spectra as whitened_spectra
from lowrank_jax.planning.selectors import total_energy
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.tracing import trace
from lowrank_jax.tuning.timer import Timer, layer_seconds


def plan(
    apply: Callable,
    variables: Any,
    images: Any,
    *args: Any,
    macs: int | float | None = None,
    parameters: int | float | None = None,
    bytes: int | float | None = None,
    latency: float | None = None,
    batch: int = 1,
    timer: Timer | None = None,
    multiple: int = 1,
    select: Callable = total_energy,
    **kwargs: Any,
) -> Plan:
    """Chooses the rank of every layer of a Linen model within a budget, by what its outputs lose on
    data.

    Args:
        apply: ``model.apply``, or a function that calls it.
        variables: trained variables, "params" and others.
        images: unlabelled inputs (batch, ...); costs are those of one of them.
        *args, **kwargs: other arguments of ``apply``, in evaluation.
        macs, parameters, bytes, latency: the budget, exactly one of them; a float up to 1 is a share
            of the dense network's, an int is absolute. With latency, the layers are measured on
            this device, dense and at a few ranks, and none gets a rank at which it is slower.
        batch: how many images are to run at once, for latency.
        timer: that measures; keep one to measure once.
        multiple: ranks are restricted to multiples of it.
        select: a selector of `lowrank_jax.planning` that takes candidates and a budget.

    Returns:
        The plan; it prints as a table, and ``plan.ranks`` is the table for `decompose` and
        `compress`.

    Raises:
        ValueError: not one budget, a budget below the least possible, no layer that can be
            decomposed, or images that are empty, not finite or of a shape that the model does not
            take.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(16, (3, 3))]), jax.random.normal(jax.random.key(1), (4, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), images)
        >>> chosen = plan(model.apply, variables, images, macs=0.5)
        >>> chosen.ranks["layers_0"].rank, chosen.total("macs")
        (8, (73728, 36864))
    """
    budget = one_budget(macs=macs, parameters=parameters, bytes=bytes, latency=latency)
    variables, images = flax.core.unfreeze(variables), check_images(images)
    uses = traced_on(images, lambda images: trace(apply, variables, images, *args, **kwargs))
    seen = calibrate(apply, variables, batched(images), uses.safe_paths(), *args, **kwargs)
    scales = output_scales(apply, variables, images[:1], *args, **kwargs)
    found = whitened_spectra(variables["params"], uses, seen, scales)
    table = candidates(uses, found, multiple)
    if budget.measure == "latency":
        together = trace(apply, variables, several(images, batch), *args, **kwargs)
        table = timed(
            table,
            layer_seconds(
                together, timer or Timer(default_options()), list(table.layers), multiple
            ),
        )
    return select(table, budget)
