"""How much each output channel of a layer counts: the scales that the program puts on it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from lowrank_jax.calibration.network import Network
from lowrank_jax.program.channels import SCALES, Channels, Step
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.flat import flatten
from lowrank_jax.program.interpreter import bind
from lowrank_jax.program.jaxprs import constants, opened
from lowrank_jax.program.survey import Survey


def channel_importance(network: Network, inputs: tuple) -> dict[str, np.ndarray]:
    """The product of the scales of each channel between a layer and the next other operation.

    A batch normalisation in evaluation scales by |scale| / deviation, whoever wrote it. A layer
    whose output is read by others than scales and shifts has no entry; all its channels count
    alike.

    Returns:
        Layer path to the importance of its output channels.
    """
    traced = network.program(inputs)
    flat = flatten(traced.program.closed, traced.sources)
    jaxpr = opened(flat)
    kinds = traced.kinds()
    fixed = [var for var, kind in zip(jaxpr.invars, kinds, strict=True) if kind != "image"]
    channels = Channels(jaxpr, fixed)
    chains: dict[str, list[Step]] = {}
    for found in Survey.of(jaxpr, traced.sources).found:
        reading = found.reading
        axis = reading.channel_axis
        if axis is not None and not reading.reason and reading.source is not None:
            steps = channels.after(reading.eqn.outvars[0], axis)
            scales = [step for step in steps if step.name in SCALES]
            if scales and not reading.layout.stack:
                chains.setdefault(reading.source.path, scales)
    return _products(flat, channels, chains, network.leaves(inputs))


def _products(flat: Any, channels: Channels, chains: dict, values: Sequence[Any]) -> dict:
    wanted = [step.by for steps in chains.values() for step in steps]
    known = iter(evaluate(flat, channels, wanted, values))
    found = {}
    for path, steps in chains.items():
        scale: Any = 1.0
        for step in steps:
            by = np.abs(_along(next(known), step.axis))
            scale = scale * by if step.name == "mul" else scale / by
        if np.size(scale) > 1 and np.isfinite(scale).all():
            found[path] = scale
    return found


def _along(value: Any, axis: int) -> np.ndarray:
    """The entries of an array along the one axis on which they differ."""
    wide = np.asarray(value, np.float64)
    if axis < 0:
        return wide.ravel()[0]
    return np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1)[:, 0]


def evaluate(flat: Any, channels: Channels, wanted: Sequence[Any], values: Sequence) -> list:
    """The values of variables that do not depend on the images.

    Args:
        flat: the program.
        channels: tells which variables these are.
        wanted: variables or literals.
        values: of the program's inputs.
    """
    jaxpr = opened(flat)

    def run(inputs: Sequence[jax.Array]) -> list:
        variables = [*jaxpr.constvars, *jaxpr.invars]
        known = dict(zip(variables, [*constants(flat), *inputs], strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else known[var]

        for eqn in jaxpr.eqns:
            if all(var in channels.fixed for var in eqn.outvars):
                found = bind(eqn, [read(var) for var in eqn.invars])
                known.update(zip(eqn.outvars, found, strict=True))
        return [jnp.asarray(read(var)) for var in wanted]

    return jax.jit(run, compiler_options=default_options())(values)
