"""Whether a training is still made of numbers, and what is said where it is not."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.program.names import leaf_names

FINITE = -1  # in the metric "not_finite": no leaf


def first_not_finite(total: jax.Array, params: Any, grads: Any) -> jax.Array:
    """The number of the first parameter whose value or gradient is not finite, or -1.

    The parameters are looked at only if the total is not finite. Where all of them are finite, it
    is their count.
    """

    def look() -> jax.Array:
        finite = [x & g for x, g in zip(_are_finite(params), _are_finite(grads), strict=True)]
        return jnp.argmin(jnp.stack([*finite, jnp.array(False)])).astype(jnp.int32)

    return jax.lax.cond(jnp.isfinite(total), lambda: jnp.int32(FINITE), look)


def not_finite(
    step: int,
    which: int,
    metrics: Mapping[str, jax.Array],
    params: Any,
    kept: str,
    labels: Any,
) -> FloatingPointError:
    """The error of a step whose loss or gradient is not finite.

    Args:
        step: its number.
        which: as `first_not_finite` gives it.
        metrics: of the step.
        params: the parameters.
        kept: where the last good state is.
        labels: of the batch; None where the loss reads none.
    """
    loss, norm = float(metrics["loss"]), float(metrics["gradient"])
    alone = "the norm alone" if math.isfinite(loss) else "the loss alone"
    return FloatingPointError(
        f"Step {step}: the loss is {loss:.3g} and the norm of its gradient {norm:.3g}; the first "
        f"that is not finite, in its value or its gradient, is {[*_names(params), alone][which]}. "
        f"{kept}. Lower the learning rate, or look at the data{_range(labels)}."
    )


def check_parameters(step: int, params: Any, kept: str) -> None:
    """Refuses parameters that the last update has made infinite or NaN, before they are kept.

    Args:
        step: number of the last step.
        params: the parameters.
        kept: where the last good state is.

    Raises:
        FloatingPointError: a parameter is not finite.
    """
    pairs = zip(_names(params), _are_finite(params), strict=True)
    lost = [name for name, finite in pairs if not finite]
    if lost:
        raise FloatingPointError(
            f"Step {step}: the update makes {lost[0]} infinite or NaN. {kept}. Lower the learning "
            "rate, or look at the optimiser: in float16 many of its numbers are 0."
        )


def _names(params: Any) -> list[str]:
    return leaf_names(params, is_leaf=lambda _: False)


@jax.jit
def _are_finite(tree: Any) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]


def _range(labels: Any) -> str:
    """What the labels of a batch are, where they are ints."""
    if not getattr(labels, "size", 0) or not np.issubdtype(labels.dtype, np.integer):
        return ""
    return (
        ": labels are ints from 0 to the number of classes less 1, and those of the last batch "
        f"are {int(labels.min())} to {int(labels.max())}"
    )
