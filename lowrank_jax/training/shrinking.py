"""Compression in stages: compress, tune, and compress what was tuned again, to the next budget."""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax.calibration.collecting import calibrate
from lowrank_jax.compression.compressing import compress
from lowrank_jax.planning.planner import plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.training.checkpoints import Checkpoints
from lowrank_jax.training.finetuning import finetune
from lowrank_jax.tree.decomposing import decompose, reconstruct

PLAN, STAGE = "plan.json", "-macs-"


def shrink(
    apply: Callable,
    variables: Any,
    inputs: Any,
    batches: Any,
    *,
    macs: Sequence[float],
    tune: Mapping[str, Any],
    folder: str | os.PathLike | None = None,
    **kwargs: Any,
) -> tuple[Any, Plan]:
    """Compresses a dense network along a schedule of budgets, and tunes it at each of them.

    The ranks of a stage are chosen by `plan` from the kernels that the previous stage has trained,
    as trained rank pruning does (Xu et al., 2020, arXiv 2004.14566), and the factors are fitted to
    what those kernels compute. The dense network is the teacher of every stage.

    Args:
        apply: ``model.apply``, or any function of a tree and inputs.
        variables: of the dense network.
        inputs: unlabelled, for the plans and the fits, as in `calibrate`.
        batches: for the tuning, as in `finetune`.
        macs: shares of the dense macs, each smaller than the one before, such as (0.7, 0.5).
        tune: arguments of `finetune`, such as ``{"epochs": 2, "batch_size": 64}``.
        folder: of the run, with one folder for each stage; the same call goes on from there.
        **kwargs: arguments of the model itself.

    Returns:
        The network at the last budget, and its plan.

    Raises:
        ValueError: the shares do not fall, or `plan`, `compress` or `finetune` refuses an argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((8, 9))
        >>> dense, data = model.init(jax.random.key(0), x), (x, jnp.zeros(8, int))
        >>> tune = dict(steps=2, batch_size=4)
        >>> small, last = shrink(model.apply, dense, x, data, macs=(0.9, 0.6), tune=tune)
        >>> last.total("macs")
        (88, 44)
    """
    check_schedule(macs)
    inputs = list(inputs) if isinstance(inputs, Iterator) else inputs  # which every stage reads
    dense, current = variables, variables
    for number, share in enumerate(macs):
        own = None if folder is None else Path(folder) / f"{number}{STAGE}{share:g}"
        chosen, start = _compressed(apply, dense, current, inputs, share, own, kwargs)
        options: dict[str, Any] = {"teacher": dense, **tune, "folder": own, "plan": chosen}
        current = finetune(apply, start, batches, **options, **kwargs)
    return current, chosen


def last_stage(folder: str | os.PathLike) -> Path:
    """The folder of the last stage within the folder of a run."""
    return max(Path(folder).glob(f"*{STAGE}*"), key=_number)


def _number(path: Path) -> int:
    return int(path.name.partition(STAGE)[0])


def check_schedule(macs: Sequence[float]) -> None:
    """Refuses shares that do not fall, or that are no shares.

    Raises:
        ValueError: a share is not between 0 and 1, or not smaller than the share before.
    """
    shares = [1.0, *macs] if isinstance(macs, list | tuple) else [1.0]
    falls = all(0 < after < before for before, after in itertools.pairwise(shares))
    if len(shares) == 1 or not falls:
        raise ValueError(
            f"macs={macs!r} is not allowed; give shares between 0 and 1, each smaller than "
            "the one before, such as (0.7, 0.5)."
        )


def _compressed(
    apply: Callable,
    dense: Any,
    current: Any,
    inputs: Any,
    share: float,
    folder: Path | None,
    kwargs: Mapping[str, Any],
) -> tuple[Plan, Any]:
    """The plan of a stage, and the network before its tuning."""
    chosen = Plan.load(folder / PLAN) if folder and (folder / PLAN).exists() else None
    if chosen and folder and Checkpoints(folder).steps():
        return chosen, decompose(dense, chosen)  # `finetune` reads the values from its checkpoint
    found = calibrate(apply, reconstruct(current), inputs, **kwargs)
    chosen = chosen or plan(found, macs=share)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        chosen.save(folder / PLAN)
    return chosen, compress(found, chosen)
