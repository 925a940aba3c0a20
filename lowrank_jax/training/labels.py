"""Labels of classes."""

from typing import Any

import jax
import jax.numpy as jnp


def probabilities(labels: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Labels as a distribution over the classes.

    Args:
        labels: ints (batch, ...) from 0, or probabilities.
        shape: of the logits, (batch, ..., classes).

    Returns:
        Probabilities of that shape. For an int that is no class they are NaN, because a loss of
        zero would hide the mistake.

    Raises:
        ValueError: labels of another shape or type.

    Example:
        >>> probabilities(jnp.array([1, 3]), (2, 3)).tolist()
        [[0.0, 1.0, 0.0], [nan, nan, nan]]
    """
    labels = one_array(labels)
    ints = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != (shape[:-1] if ints else shape):
        raise ValueError(
            f"Labels {labels.dtype} {labels.shape} are not allowed for outputs {shape}; give ints "
            f"{shape[:-1]}, or probabilities {shape}."
        )
    if not ints:
        return labels
    if labels.dtype.itemsize < 4:  # the number of classes may be more than these ints hold
        labels = labels.astype(jnp.int32)
    known = (labels >= 0) & (labels < shape[-1])
    return jnp.where(known[..., None], jax.nn.one_hot(labels, shape[-1]), jnp.nan)


def one_array(labels: Any) -> jax.Array:
    """The labels, if they are one array.

    Raises:
        ValueError: they are several, or none.
    """
    if not hasattr(labels, "dtype"):
        raise ValueError(
            f"Labels that are a {type(labels).__name__} are not allowed in this loss; give one "
            "array, or a loss of your own: a function of (outputs, labels)."
        )
    return labels
