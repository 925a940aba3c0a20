"""The variables of a network within the state of a training, such as Flax's `TrainState`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG = logging.getLogger("lowrank_jax")
PARAMS, OPTIMISER = "params", "opt_state"


def variables_in(tree: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """The variables that a checkpoint holds: the tree itself, or a part of a state of a training.

    Args:
        tree: as it was read. It is the state of a training if "opt_state" stands beside "params".
        path: for the line of the log that says what was left out.

    Example:
        >>> state = {"step": 3, "params": {"bias": 1}, "batch_stats": {"mean": 2}, "opt_state": {}}
        >>> variables_in(state, Path("state.msgpack"))
        {'params': {'bias': 1}, 'batch_stats': {'mean': 2}}
    """
    if not {PARAMS, OPTIMISER} <= tree.keys():
        return tree
    whole = tree[PARAMS]  # a state may keep all variables under this name
    nested = isinstance(whole, Mapping) and isinstance(whole.get(PARAMS), Mapping)
    found = dict(whole) if nested else {name: tree[name] for name in _collections(tree)}
    left_out = sorted(str(name) for name in tree if name not in found)
    LOG.info("%s is the state of a training; left out: %s.", path, ", ".join(left_out))
    return found


def _collections(tree: Mapping[Any, Any]) -> list[Any]:
    named = [name for name, value in tree.items() if isinstance(value, Mapping)]
    return [name for name in named if name != OPTIMISER]
