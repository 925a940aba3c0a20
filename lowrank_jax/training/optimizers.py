"""Optimisers, and their states across a decomposition."""

import logging
import math
from typing import Any

import chex
import jax
import numpy as np
import optax

from lowrank_jax.factorization.factors import is_factors
from lowrank_jax.program.names import names_of
from lowrank_jax.training.arguments import check_kinds

LOG = logging.getLogger("lowrank_jax")


def one_cycle_sgd(
    learning_rate: float, steps: int, weight_decay: float = 5e-4, clip: float | None = None
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9 under a one-cycle cosine schedule.

    The learning rate peaks after a fifth of the steps. Weights of two or more axes decay.

    Args:
        learning_rate: highest of the run, above 0.
        steps: of the whole run.
        weight_decay: share of a weight that is added to its gradient.
        clip: largest norm of the whole gradient, above 0; None for no limit.

    Raises:
        ValueError: the learning rate or the largest norm is not allowed.

    Example:
        >>> params = {"kernel": np.ones((2, 2), np.float32)}
        >>> tx = one_cycle_sgd(0.1, steps=100)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> round(float(updates["kernel"][0, 0]), 4)
        -0.019
    """
    check_kinds({"learning_rate": learning_rate, "clip": clip})
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"{learning_rate=} is not allowed; give a number above 0.")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip!r} is not allowed; give a number above 0, or None.")
    schedule = optax.cosine_onecycle_schedule(
        max(steps, 2), learning_rate, pct_start=0.2, div_factor=10, final_div_factor=1e3
    )
    decay = optax.add_decayed_weights(
        weight_decay, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    )
    limit = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
    return optax.chain(limit, decay, optax.sgd(schedule, momentum=0.9, nesterov=True))


def carry_optimizer(
    tx: optax.GradientTransformation, state: optax.OptState, params: chex.ArrayTree
) -> optax.OptState:
    """The state of an optimiser for a tree some of whose kernels became factors.

    What the state holds for a leaf, such as its moments, is kept where the new tree has the leaf at
    the same path with the same shape, and so are counts of steps. All else is as `tx.init` makes
    it, and so is what belongs to factors: factors of the same shapes may be of another
    decomposition. One line of the log names the layers that start anew.

    Args:
        tx: the optimiser.
        state: for the tree as it was.
        params: the tree as it is: the trained leaves, as `TrainState` holds them.

    Returns:
        The state for the new tree.

    Example:
        >>> old = {"a": np.ones((3, 3, 4, 4), np.float32), "b": np.ones(4, np.float32)}
        >>> pair = {"vertical": np.ones((3, 1, 4, 2)), "horizontal": np.ones((1, 3, 2, 4))}
        >>> tx = optax.trace(0.9)
        >>> state = tx.update(old, tx.init(old), old)[1]
        >>> carried = carry_optimizer(tx, state, {"a": pair, "b": old["b"]})
        >>> carried.trace["b"].tolist(), float(carried.trace["a"]["vertical"].max())
        ([1.0, 1.0, 1.0, 1.0], 0.0)
    """
    known, factors = _by_path(state), _factors(params)
    fresh, structure = jax.tree_util.tree_flatten_with_path(tx.init(params))
    leaves, reset = [], []
    for path, leaf in fresh:
        own = known.get(jax.tree_util.keystr(path))
        fits = own is not None and np.shape(own) == np.shape(leaf) and own.dtype == leaf.dtype
        fits = fits and not any(_holds(path, part) for part in factors)
        leaves.append(own if fits else leaf)
        if not fits:
            reset.append(path)
    if reset:
        LOG.info("The optimiser starts anew for %s.", ", ".join(_layers(reset, params)))
    return jax.tree.unflatten(structure, leaves)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _factors(params: Any) -> list[tuple]:
    """The paths of the kernels that are factors."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    return [path for path, leaf in leaves if is_factors(leaf)]


def _layers(paths: list, params: Any) -> list[str]:
    """The layers to which some paths of a state belong; the paths where they belong to none."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    own = [path for path, _ in leaves]
    layers = dict(zip(own, names_of(own), strict=True))
    found = [name for path in paths for part, name in layers.items() if _holds(path, part)]
    return list(dict.fromkeys(found)) or [jax.tree_util.keystr(path) for path in paths]


def _holds(path: tuple, part: tuple) -> bool:
    """Whether one path stands within another."""
    ends = range(len(part), len(path) + 1)
    return any(path[end - len(part) : end] == part for end in ends)
