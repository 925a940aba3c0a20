"""From an NNX model, a little unlabelled data and a budget to a plan."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from lowrank_jax.nnx.calibrate import calibrate, output_scales
from lowrank_jax.nnx.decompose import trace
from lowrank_jax.nnx.watch import evaluated
from lowrank_jax.planning.candidates import candidates
from lowrank_jax.planning.measured import timed
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.selection import (
    batched,
    check_images,
    one_budget,
    several,
    traced_on,
    whitened_spectra,
)
from lowrank_jax.planning.selectors import total_energy
from lowrank_jax.program.compiler import default_options
from lowrank_jax.tuning.timer import Timer, layer_seconds


def plan(
    model: Any,
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
    """Chooses the rank of every layer of an NNX model within a budget, by what its outputs lose on
    data.

    Args:
        model: `nnx.Module`; it runs in evaluation and is not changed.
        images: unlabelled inputs (batch, ...); costs are those of one of them.
        *args, **kwargs: other arguments of the model's call.
        macs, parameters, bytes, latency, batch, timer, multiple, select: as in `lowrank_jax.plan`.

    Returns:
        The plan; it prints as a table, and ``plan.ranks`` is the table for `decompose` and
        `compress`.

    Raises:
        ValueError: not one budget, a budget below the least possible, no layer that can be
            decomposed, or images that are empty, not finite or of a shape that the model does not
            take.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)))
        >>> chosen = plan(model, jax.random.normal(jax.random.key(1), (4, 8, 8, 8)), macs=0.5)
        >>> chosen.ranks["layers/0"].rank, chosen.total("macs")
        (8, (73728, 36864))
    """
    budget = one_budget(macs=macs, parameters=parameters, bytes=bytes, latency=latency)
    images, still = check_images(images), evaluated(model)
    uses = traced_on(images, lambda images: trace(still, images, *args, **kwargs))
    seen = calibrate(model, batched(images), uses.safe_paths(), *args, **kwargs)
    scales = output_scales(model, images[:1], *args, **kwargs)
    found = whitened_spectra(nnx.to_pure_dict(nnx.state(model)), uses, seen, scales)
    table = candidates(uses, found, multiple)
    if budget.measure == "latency":
        together = trace(still, several(images, batch), *args, **kwargs)
        table = timed(
            table,
            layer_seconds(
                together, timer or Timer(default_options()), list(table.layers), multiple
            ),
        )
    return select(table, budget)
