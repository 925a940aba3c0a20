"""The values that a program puts on the channels of a layer, and that no input changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.compression.outline import Outline
from lowrank_jax.program.channels import Step
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.interpreter import bind
from lowrank_jax.program.jaxprs import beginning, values_of

SMALLEST = 1e-3  # of the largest scale of a layer's channels; below, a channel has no say


def along(value: Any, axis: int) -> np.ndarray:
    """The entries of an array along the one axis on which they differ."""
    wide = np.asarray(value, np.float64)
    if axis < 0:
        return wide.ravel()[0]
    return np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1)[:, 0]


def product_of(steps: Sequence[Step], values: Sequence[Any], channels: int) -> np.ndarray:
    """The scale of each channel that some steps make, by the values that they scale by.

    It is zero where a channel has no say.
    """
    scale = np.ones(channels)
    for step, value in zip(steps, values, strict=True):
        by = along(value, step.axis)
        scale = scale * by if step.name == "mul" else scale / np.where(by == 0, 1, by)
    kept = np.abs(scale) >= SMALLEST * np.abs(scale).max(initial=0)
    return np.where(kept & np.isfinite(scale), scale, 0)


def inverse(scale: np.ndarray) -> np.ndarray:
    """One over a scale; zero where a channel is to be left alone."""
    return np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale))


def evaluate(
    outline: Outline, wanted: Mapping[int, Sequence[Any]], values: Sequence
) -> dict[int, list[jax.Array]]:
    """The values of variables that do not depend on the images.

    Args:
        outline: of the program.
        wanted: index of an equation to variables or literals.
        values: of the program's inputs.

    Returns:
        Index of an equation to the values of its variables.
    """
    flat, jaxpr, channels = outline.flat, outline.jaxpr, outline.channels

    def run(inputs: Sequence[jax.Array]) -> dict[int, list[jax.Array]]:
        known = beginning(flat, inputs)
        for eqn in jaxpr.eqns:
            if all(var in channels.fixed for var in eqn.outvars):
                found = bind(eqn, values_of(eqn.invars, known))
                known.update(zip(eqn.outvars, found, strict=True))
        return {place: [*map(jnp.asarray, values_of(own, known))] for place, own in wanted.items()}

    return jax.jit(run, compiler_options=default_options())(values)
