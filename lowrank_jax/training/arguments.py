"""What the arguments of a training may be: which kinds of values, and which beside which."""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.jaxprs import is_array
from lowrank_jax.training import augmentation
from lowrank_jax.tree.kinds import is_int, is_number

MAKERS = (augmentation.chain, augmentation.crops_and_flips, augmentation.cutmix, augmentation.mixup)


class Kind(NamedTuple):
    """Whether a value is of a kind, what is allowed in words, and whether None is, too."""

    fits: Callable[[Any], bool]
    allowed: str
    optional: bool = True


def check_kinds(given: Mapping[str, Any]) -> None:
    """Refuses a value of another kind than its argument has.

    Args:
        given: names of arguments to their values; names that are not in the table are left out.

    Raises:
        ValueError: a value is of another kind.

    Example:
        >>> check_kinds({"learning_rate": 0.1, "clip": None, "apply": 3})
    """
    for name in filter(given.__contains__, KINDS):  # in the order of the table
        fits, allowed, optional = KINDS[name]
        if not (optional and given[name] is None) and not fits(given[name]):
            raise ValueError(f"{name}={given[name]!r:.80} is not allowed; give {allowed}.")


def check_idle(
    teacher_apply: Callable | None, teacher: Any, after_epoch: Callable | None, epoch: int | None
) -> None:
    """Refuses functions that would never be called.

    Args:
        teacher_apply, teacher, after_epoch: as in `finetune`.
        epoch: steps of an epoch; None for batches that cannot be counted.

    Raises:
        ValueError: there is such a function, or one in the place of the teacher's variables.
    """
    if callable(teacher) and not any(map(is_array, jax.tree.leaves(teacher))):
        raise ValueError(
            f"teacher={teacher!r:.80} is not allowed; give the variables of the dense network, and "
            "its function, where it is another one, as teacher_apply."
        )
    if teacher_apply is not None and teacher is None:
        raise ValueError(
            f"teacher_apply={teacher_apply!r:.80} is not allowed without teacher, the variables "
            "that it is called with; give both, or neither."
        )
    if after_epoch is not None and epoch is None:
        raise ValueError(
            f"after_epoch={after_epoch!r:.80} is not allowed for batches that cannot be counted, "
            "which have no epochs; give arrays or a list of batches, or leave it out."
        )


def _is_seed(value: Any) -> bool:
    return is_int(value) and 0 <= value < 2**63


def _is_optimiser(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("init", "update"))


def _is_floating(value: Any) -> bool:
    try:
        return jnp.issubdtype(value, jnp.floating)
    except TypeError:
        return False


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_names(value: Any) -> bool:
    listed = isinstance(value, Collection) and not isinstance(value, str | Mapping)
    return listed and all(isinstance(name, str) for name in value)


def _is_augmentation(value: Any) -> bool:
    return callable(value) and value not in MAKERS


KINDS = {
    "learning_rate": Kind(
        is_number, "a number above 0, and a schedule by tx=, as in tx=optax.sgd(schedule)", False
    ),
    "seed": Kind(_is_seed, "an int from 0 to below 2**63", False),
    "clip": Kind(is_number, "a number above 0, or None"),
    "average": Kind(is_number, "a decay between 0 and 1, such as 0.999"),
    "tx": Kind(_is_optimiser, "an optimiser of optax, such as optax.adam(1e-3)"),
    "trained": Kind(_is_mapping, "a dict of patterns to bools, such as {'stem': False}"),
    "augment": Kind(_is_augmentation, "a function of (key, batch), such as mixup(10)"),
    "dtype": Kind(_is_floating, "a floating type, such as jnp.bfloat16"),
    "folder": Kind(lambda value: isinstance(value, str | os.PathLike), "a path"),
    "teacher_apply": Kind(callable, "a function of (variables, inputs), such as model.apply"),
    "plan": Kind(lambda value: isinstance(value, Plan), "a Plan, such as plan() returns, or None"),
    "after_epoch": Kind(callable, "a function of (epoch, variables, metrics)"),
    "sharding": Kind(
        lambda value: isinstance(value, NamedSharding), "NamedSharding(mesh, PartitionSpec('data'))"
    ),
    "train_kwargs": Kind(_is_mapping, "a dict of arguments of the model, such as {'scale': 1.0}"),
    "mutable": Kind(_is_names, "a list of collections, such as ['batch_stats']"),
    "rngs": Kind(_is_names, "a list of random streams, such as ['dropout']"),
    "choose": Kind(callable, "a function of (layer, scheme) that gives the name of an algorithm"),
}
