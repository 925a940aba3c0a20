"""Compression in stages: compress, tune, and compress what was tuned again, to the next budget."""

import inspect
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lowrank_jax.calibration.collecting import calibrate
from lowrank_jax.compression.compressing import compress
from lowrank_jax.planning.planner import plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.jaxprs import check_options
from lowrank_jax.training.arguments import check_kinds
from lowrank_jax.training.checkpoints import begun, last_step, load_tree, save_tree
from lowrank_jax.training.finetuning import TEACHES, count_steps, finetune
from lowrank_jax.training.fingerprints import fingerprint
from lowrank_jax.training.losses import Loss
from lowrank_jax.training.order import batches_of
from lowrank_jax.training.origins import Origin, has_origin, new_origin, origin_of
from lowrank_jax.tree.decomposing import decompose, reconstruct
from lowrank_jax.tree.kinds import is_number

PLAN, START, STAGE = "plan.json", "start", "-macs-"


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
    what those kernels compute. The dense network is the teacher of every stage, unless the loss
    needs none.

    Args:
        apply: ``model.apply``, or any function of a tree and inputs.
        variables: of the dense network.
        inputs: unlabelled, for the plans and the fits, as in `calibrate`.
        batches: for the tuning, as in `finetune`; a generator has to last for all stages.
        macs: shares of the dense macs, each smaller than the one before, such as (0.7, 0.5).
        tune: arguments of `finetune`, such as ``{"epochs": 2, "batch_size": 64}``, without "folder"
            and "plan", which each stage has of its own.
        folder: of the run, with one folder for each stage; the same call goes on from there, and
            so does one with more shares after the same ones.
        **kwargs: arguments of the model itself.

    Returns:
        The network at the last budget, and its plan.

    Raises:
        ValueError: the shares do not fall, the folder is of another network or of other shares, a
            kernel would be compressed twice that the program changes first, or `plan`, `compress`
            or `finetune` refuses an argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((8, 9))
        >>> dense, data = model.init(jax.random.key(0), x), (x, jnp.zeros(8, int))
        >>> tune = dict(steps=2, batch_size=4)
        >>> small, last = shrink(model.apply, dense, x, data, macs=(0.9, 0.6), tune=tune)
        >>> last.total("macs")
        (88, 50)
    """
    check_schedule(macs)
    inputs = list(inputs) if isinstance(inputs, Iterator) else inputs  # which every stage reads
    count = _steps_of(apply, tune, batches)
    stages = [None] * len(macs) if folder is None else stage_folders(folder, macs)
    _check_steps(stages, count)
    dense, current = variables, variables
    for share, own in zip(macs, stages, strict=True):
        chosen, start = _compressed(apply, dense, current, inputs, share, own, kwargs)
        _check_stored(chosen, share, macs)
        options: dict[str, Any] = {**_teacher(tune, dense), "folder": own, "plan": chosen}
        current = finetune(apply, start, batches, **options, **kwargs)
    return current, chosen


def stage_folders(folder: str | os.PathLike, macs: Sequence[float]) -> list[Path]:
    """The folders of the stages, within the folder of a run.

    Raises:
        ValueError: a stage of another share was trained in one's place.

    Example:
        >>> [path.name for path in stage_folders("run", (0.8, 0.6))]
        ['0-macs-0.8', '1-macs-0.6']
    """
    own = [Path(folder) / f"{number}{STAGE}{share:g}" for number, share in enumerate(macs)]
    for number, path in enumerate(own):
        others = [other for other in Path(folder).glob(f"{number}{STAGE}*") if other != path]
        if trained := [other for other in others if begun(other)]:
            raise ValueError(
                f"{folder} holds the stage {trained[0].name}, not {path.name}; give the shares "
                "that the run had, or another folder."
            )
    return own


def _teacher(tune: Mapping[str, Any], dense: Any) -> dict[str, Any]:
    """The arguments of `finetune`, with the dense network as teacher unless the loss has none."""
    loss = tune.get("loss")
    taught = loss is None or bool(Loss.of(loss).needs & TEACHES)
    return {"teacher": dense, **tune} if taught else dict(tune)


def _check_steps(stages: Sequence[Path | None], steps: int) -> None:
    """Refuses other steps for a stage whose network a later stage has begun from.

    Raises:
        ValueError: such a stage has other steps.
    """
    known = [None if own is None else last_step(own) for own in stages]
    for own, done, later in zip(stages, known, known[1:], strict=False):
        if later is not None and done is not None and done != steps:
            raise ValueError(
                f"{own} holds a stage of {done} steps, from which the next one has begun, and "
                f"{steps} are asked for; give as many steps, or another folder."
            )


def _steps_of(apply: Callable, tune: Mapping[str, Any], batches: Any) -> int:
    """The steps of a stage; refuses arguments of `finetune` before the first one is compressed.

    Raises:
        ValueError: an argument is not known, not allowed, of another kind or lacking.
    """
    if not isinstance(tune, Mapping):
        raise ValueError(
            f"tune={tune!r:.80} is not allowed; give arguments of finetune, such as "
            "{'epochs': 2, 'batch_size': 64}."
        )
    _check_stages(tune)
    known = inspect.signature(finetune).parameters
    check_options(finetune, apply, [name for name in tune if name not in known])
    check_kinds(tune)
    _teacher(tune, None)  # which reads the loss
    data = batches_of(batches, tune.get("batch_size", known["batch_size"].default))
    return count_steps(data, tune.get("steps"), tune.get("epochs"))


def _check_stages(tune: Mapping[str, Any]) -> None:
    for name in ("folder", "plan"):
        if name in tune:
            raise ValueError(
                f"tune={{{name!r}: {tune[name]!r:.80}}} is not allowed, as each stage has a {name} "
                f"of its own; leave {name!r} out, and give shrink the folder of all stages."
            )


def check_schedule(macs: Sequence[float]) -> None:
    """Refuses shares that do not fall, or that are no shares.

    Raises:
        ValueError: a share is not between 0 and 1, or not smaller than the share before.
    """
    shares = [1.0, *macs] if isinstance(macs, list | tuple) else [1.0]
    known = all(map(is_number, shares))
    falls = known and all(0 < after < before for before, after in itertools.pairwise(shares))
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
    origin = {"network": fingerprint(current), **origin_of(inputs, kwargs)}
    if folder and has_origin(folder, origin):
        return _kept(folder, dense)
    found = calibrate(apply, reconstruct(current), inputs, **kwargs)
    chosen = plan(found, macs=share)
    small = compress(found, chosen)
    if folder:
        _keep(folder, origin, chosen, small)
    return chosen, small


def _check_stored(chosen: Plan, share: float, macs: Sequence[float]) -> None:
    """Refuses another stage after one whose kernels are not those that the model stores."""
    if chosen.changed and share != macs[-1]:
        raise ValueError(
            f"{chosen.changed[0]}: the program changes this kernel before it reads it, so that "
            "what a stage trains cannot be compressed again; give one share, as in "
            f"macs=({macs[-1]:g},)."
        )


def _keep(folder: Path, origin: Origin, chosen: Plan, small: Any) -> None:
    with new_origin(folder, origin):
        shutil.rmtree(folder / START, ignore_errors=True)
        chosen.save(folder / PLAN)
        save_tree(folder / START, small)


def _kept(folder: Path, dense: Any) -> tuple[Plan, Any]:
    """What `_keep` wrote; older versions kept no network, and the checkpoint has its values."""
    chosen = Plan.load(folder / PLAN)
    if not (folder / START).exists():
        return chosen, decompose(dense, chosen)
    shapes = jax.eval_shape(lambda tree: decompose(tree, chosen), dense)
    return chosen, load_tree(folder / START, shapes)
