"""`reestimate`: the statistics of batch normalisations set to those of the data."""

from collections.abc import Callable, Iterable, Mapping
from operator import length_hint
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_jax.calibration.inputs import Inputs
from lowrank_jax.io.progress import Progress
from lowrank_jax.program.compiler import default_options

Update = Callable[..., Any]  # of (old statistics, *inputs), to the new statistics


def reestimate(
    apply: Callable,
    variables: Mapping[str, Any],
    inputs: Any,
    *args: Any,
    collection: str = "batch_stats",
    **kwargs: Any,
) -> dict[str, Any]:
    """Sets the statistics of batch normalisations to those of the data, by forward passes alone.

    Means and variances are cumulative over the batches, each layer seeing what the layers before it
    give when they normalise by the batch at hand.

    Args:
        apply: ``model.apply`` of a Linen model, or `lowrank` of it.
        variables: variables whose statistics are to be renewed.
        inputs: one batch, or an iterable of batches of nearly equal size; see `Inputs`.
        *args: arguments of the model after its inputs.
        collection: of the statistics.
        **kwargs: arguments that make the model normalise by the batch, such as ``train=True``.

    Returns:
        The variables with new statistics.

    Raises:
        ValueError: there is no data, the activations are not finite, or the model has no batch
            normalisation or updates none.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.BatchNorm(), 3 * jnp.ones((2, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images, use_running_average=False)
        >>> new = reestimate(model.apply, variables, images, use_running_average=False)
        >>> new["batch_stats"]["mean"].round(5).tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    old = variables.get(collection)
    if not jax.tree.leaves(old):
        raise ValueError(
            f"The variables hold no {collection!r}: the model has no batch normalisation to "
            "re-estimate. Leave reestimate out."
        )

    def update(statistics: Any, *batch: Any) -> Any:
        own = {**variables, collection: statistics}
        return apply(own, *batch, *args, mutable=[collection], **kwargs)[1][collection]

    return {**variables, collection: data_statistics(update, old, Inputs(inputs))}


def data_statistics(update: Update, old: Any, batches: Iterable[tuple]) -> Any:
    """The statistics that the data have, from a function that updates running ones.

    A running statistic becomes m * old + (1 - m) * batch, which is linear in the old one. Two
    updates that differ in the old ones tell m, and so the batch's own.

    Args:
        update: function of (old statistics, *inputs) to the new ones.
        old: a tree of statistics, in which a "var" stands beside its "mean".
        batches: the inputs.

    Raises:
        ValueError: there are no inputs, the activations are not finite, or ``update`` changes
            nothing.
    """
    run = jax.jit(update, compiler_options=default_options())
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(old)]
    leaves, tree = jax.tree.flatten(old)
    start = [np.asarray(leaf, np.float64) for leaf in leaves]
    keep: list[np.ndarray] = []
    sums = [np.zeros((2, *x.shape)) for x in start]
    count = 0
    with Progress("re-estimating", length_hint(batches) or None) as progress:
        for batch in progress.over(batches):
            new = _wide(run(old, *batch))
            if not count:
                above = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), old)
                keep = [b - a for a, b in zip(new, _wide(run(above, *batch)), strict=True)]
            own = [_of_batch(*each) for each in zip(new, start, keep, strict=True)]
            sums = [total + np.stack([x, x**2]) for total, x in zip(sums, own, strict=True)]
            count += 1
    if not count:
        raise ValueError("No calibration data: give at least one batch of inputs.")
    averages = [total / count for total in sums]
    found = _with_variances(paths, averages)
    _check(paths, found, keep)
    typed = [jnp.asarray(x, leaf.dtype) for x, leaf in zip(found, leaves, strict=True)]
    return jax.tree.unflatten(tree, typed)


def _wide(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]


def _of_batch(new: np.ndarray, old: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The batch's own statistic; the old one where nothing is updated."""
    short = keep.round(5)  # momenta are short decimals, which float32 differences tell to 1e-7
    keep = np.where(np.abs(short - keep) < 1e-6, short, keep)
    part = 1 - keep
    moves = ~(part <= 1e-6)  # what is no number stays none, and is refused
    return np.where(moves, (new - keep * old) / np.where(moves, part, 1), old)


def _with_variances(paths: list, averages: list[np.ndarray]) -> list[np.ndarray]:
    """The variance over all batches is the mean of theirs and the variance of their means."""
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    found = []
    for name, (mean, _) in zip(names, averages, strict=True):
        layer, _, last = f"/{name}".rpartition("/")
        twin = f"{layer}/mean".removeprefix("/")
        if last == "var" and twin in names:
            one, square = averages[names.index(twin)]
            mean = mean + square - one**2
        found.append(mean)
    return found


def _check(paths: list, found: list[np.ndarray], keep: list[np.ndarray]) -> None:
    for path, value in zip(paths, found, strict=True):
        if not np.isfinite(value).all():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"{name}: the activations hold NaN or infinite values; check weights and images."
            )
    if all((x > 1 - 1e-6).all() for x in keep):
        raise ValueError(
            "The model updates no statistics: give the arguments that make it normalise by the "
            "batch, such as train=True."
        )
