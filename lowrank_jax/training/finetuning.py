"""`finetune`: trains a decomposed network, or any other, in one call."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lowrank_jax.calibration.inputs import warn_if_raw
from lowrank_jax.planning.leaves import check_plan
from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.compiler import gradient_options
from lowrank_jax.program.jaxprs import check_function, check_options
from lowrank_jax.training.arguments import check_idle, check_kinds
from lowrank_jax.training.augmentation import Augment, parts
from lowrank_jax.training.forward import check_mutable, tell_kept
from lowrank_jax.training.losses import Loss, Name, Term
from lowrank_jax.training.optimizers import one_cycle_sgd
from lowrank_jax.training.order import Batches, batches_of
from lowrank_jax.training.partition import Rules
from lowrank_jax.training.placing import automatic, beside, on_mesh
from lowrank_jax.training.runs import AfterEpoch, Run
from lowrank_jax.training.state import TrainState
from lowrank_jax.training.steps import Step, make_step
from lowrank_jax.tree.kinds import check_unread, whole
from lowrank_jax.tuning.algorithms import Choose

LOG = logging.getLogger("lowrank_jax")
TEACHES = {"teacher", "layers"}
RATE, CLIP = 0.02, 1.0  # of the default optimiser
BESIDE_TX = (
    "not read beside tx, which has its own; leave it out, and build it into tx, as in "
    "optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))."
)


def finetune(
    apply: Callable,
    variables: Any,
    batches: Any,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 128,
    loss: Loss | Term | Name | None = None,
    teacher: Any = None,
    teacher_apply: Callable | None = None,
    learning_rate: float = RATE,
    clip: float | None = CLIP,
    tx: optax.GradientTransformation | None = None,
    accumulate: int = 1,
    average: float | None = None,
    trained: Rules | None = None,
    augment: Augment | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    save_every: int = 500,
    plan: Plan | None = None,
    after_epoch: AfterEpoch | None = None,
    sharding: NamedSharding | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    mutable: Sequence[str] | None = None,
    rngs: Sequence[str] | None = None,
    choose: Choose | None = None,
    **kwargs: Any,
) -> Any:
    """Trains a network, dense or decomposed, and goes on where a run in its folder ended.

    The factors are trained as any other parameter. `finetune` finds out how a Linen model is called
    in training: with ``train=True`` or what its call has instead, with its collections and its
    dropout.

    Args:
        apply: ``model.apply``, or any function of a tree and inputs; `lowrank` is not needed.
        variables: the tree, with kernels dense or as factors. It is not changed.
        batches: arrays (inputs, labels), or an iterable of such batches; see
            `lowrank_jax.training.order.batches_of`.
        steps, epochs: how long, one of both; epochs need arrays or a list.
        batch_size: examples of a batch that is cut from arrays.
        loss: a `lowrank_jax.training.losses.Loss`, its name, or a function of what it needs. By
            default "cross_entropy"; with a teacher "distillation" alone, which reads no labels.
            ``0.5 * cross_entropy() + 0.5 * distillation()`` learns from both.
        teacher: variables of the dense network, for a loss that needs them.
        teacher_apply: the teacher's function, where it is not ``apply``.
        learning_rate, clip: highest rate and largest norm of the whole gradient in the default
            optimiser, `one_cycle_sgd`. Without a limit a ResNet-20 with frozen statistics has an
            infinite loss after 15 steps.
        tx: an optimiser of optax, in place of the default one.
        accumulate: batches whose gradients are averaged for one update, at most ``steps``.
        average: decay of a moving average of the parameters, such as 0.999, which is returned in
            their place.
        trained: patterns to whether what they match is trained, as in ``{"stem": False}``; see
            `lowrank_jax.training.partition.trained_leaves`. Statistics of frozen layers are renewed
            all the same, unless ``train_kwargs={"train": False}``.
        augment: function of (key, batch) to the batch that the networks get, such as the functions
            of `lowrank_jax.training.augmentation`.
        dtype: type of the computation, such as ``jnp.bfloat16``; parameters keep their own.
        seed: of the order of the data and of all random numbers.
        folder: where checkpoints and metrics are kept; the same call goes on from there.
        save_every: steps between two checkpoints.
        plan: of the ranks, kept in the checkpoints.
        after_epoch: called with (epoch from 1, variables, mean metrics) after each epoch, of
            batches that can be counted.
        sharding: of the batches over devices, such as ``NamedSharding(mesh, P("data"))``; every
            process gives all examples. Parameters on the mesh stay where they are, the others are
            whole on each device, and the statistics of a batch are of the whole batch.
        train_kwargs: arguments of the model that have other values in training.
        mutable, rngs: the collections that training renews and the random streams it takes, where
            they are not found out.
        choose: function of (layer, scheme) to the name of the algorithm by which a convolution
            runs, such as ``Timer(training=True).fastest``; None for plain convolutions.
        **kwargs: arguments of the model itself.

    Returns:
        The trained variables, in the structure of those given.

    Raises:
        FloatingPointError: the loss is not finite; the step, a parameter and the last checkpoint
            are named.
        OSError: a checkpoint cannot be written, as on a full disk; what was saved stays.
        SystemExit: SIGTERM came; the run was saved, and the status is 143.
        ValueError: an argument is not allowed, or the folder is of another run.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import lowrank_jax as lr
        >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((8, 9))
        >>> dense = model.init(jax.random.key(0), x)
        >>> small = lr.decompose(dense, {"layers_0": 2})
        >>> tuned = finetune(model.apply, small, (x, jnp.zeros(8, int)), steps=3, batch_size=4)
        >>> tuned["params"]["layers_0"]["kernel"]["left_factor"].shape
        (9, 2)
    """
    check_kinds(locals())
    check_function(apply, variables)
    check_options(finetune, apply, kwargs)
    check_mutable(mutable, variables)
    tell_kept(apply, kwargs, (mutable, train_kwargs), variables)
    data = batches_of(batches, batch_size, seed)
    count = count_steps(data, steps, epochs)
    check_idle(teacher_apply, teacher, after_epoch, data.epoch)
    if plan is not None:
        check_plan(plan, variables)
    if tx is not None:
        check_unread(BESIDE_TX, learning_rate=(learning_rate, RATE), clip=(clip, CLIP))
    if data.epoch:  # a stream cannot be looked into
        warn_if_raw(_inputs_of(next(data.after(0)), augment))
    wanted = _loss(loss, teacher)
    optimiser = _optimiser(tx, learning_rate, clip, count, accumulate)
    step = make_step(
        apply,
        optimiser,
        wanted,
        augment=augment,
        average=average,
        dtype=dtype,
        teacher_apply=teacher_apply,
        train_kwargs=train_kwargs,
        mutable=mutable,
        rngs=rngs,
        choose=choose,
        **kwargs,
    )
    start = TrainState.create(
        variables,
        optimiser,
        seed=seed,
        trained=trained,
        renewed=mutable or (),
        average=average is not None,
    )
    start = start if sharding is None else beside(start, optimiser, sharding.mesh)
    run = Run(
        step=_compiled(step, start, sharding, dtype),
        batches=data,
        steps=count,
        seed=seed,
        loss=str(wanted),
        labelled="labels" in wanted.needs,
        settings=_settings(tx, learning_rate, clip, accumulate, average, dtype),
        teacher=teacher if sharding is None else on_mesh(teacher, sharding.mesh),
        folder=None if folder is None else Path(folder),
        save_every=whole("save_every", save_every),
        plan=plan,
        after_epoch=after_epoch,
        sharding=sharding,
    )
    return run.finish(start).averaged


def _settings(
    tx: Any, rate: float, clip: float | None, accumulate: int, average: float | None, dtype: Any
) -> dict[str, Any]:
    """What a run that goes on may have otherwise, which the log then tells."""
    return {
        "rate": float(rate) if tx is None else None,
        "clip": float(clip) if tx is None and clip is not None else None,
        "accumulate": int(accumulate),
        "average": None if average is None else float(average),
        "dtype": None if dtype is None else jax.numpy.dtype(dtype).name,
    }


def _inputs_of(batch: tuple, augment: Augment | None) -> tuple:
    """The inputs that the networks get of a batch; shapes stand for arrays that `augment` makes."""
    if augment is not None:
        batch = jax.eval_shape(augment, jax.random.key(0), batch)
    return parts(batch)[0]


def _compiled(step: Step, state: TrainState, sharding: NamedSharding | None, dtype: Any) -> Step:
    """The step as a program; on a mesh the state stays where it lies."""
    own = [leaf.dtype for leaf in jax.tree.leaves(state.params)]
    types = map(jax.numpy.dtype, own if dtype is None else [dtype])
    options = gradient_options(min(types, key=lambda own: own.itemsize, default="float32"))
    if sharding is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    step = automatic(step, sharding.mesh, (places, everywhere))
    return jax.jit(
        step, donate_argnums=0, out_shardings=(places, everywhere), compiler_options=options
    )


def count_steps(batches: Batches, steps: int | None, epochs: int | None) -> int:
    """The steps of a run that is given in steps or in epochs.

    Raises:
        ValueError: both or neither are given, or epochs of batches that cannot be counted.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"steps={steps} and epochs={epochs} are not allowed; give one of both.")
    if steps is not None:
        return whole("steps", steps)
    if batches.epoch is None:
        raise ValueError(
            f"epochs={epochs} is not allowed for batches that cannot be counted; give steps."
        )
    return whole("epochs", epochs) * batches.epoch


def _loss(loss: Loss | Term | Name | None, teacher: Any) -> Loss:
    """The loss; a teacher and a loss belong together."""
    usual: Name = "cross_entropy" if teacher is None else "distillation"
    wanted = Loss.of(usual if loss is None else loss)
    if teacher is not None and not wanted.needs & TEACHES:
        raise ValueError(
            f"The loss needs {sorted(wanted.needs)} and no teacher; leave the teacher out, or add "
            "distillation()."
        )
    return wanted


def _optimiser(
    tx: optax.GradientTransformation | None,
    learning_rate: float,
    clip: float | None,
    steps: int,
    accumulate: int,
) -> optax.GradientTransformation:
    every = whole("accumulate", accumulate)
    if every > steps:
        raise ValueError(
            f"accumulate={every} is more than the {steps} steps, which would change nothing; give "
            f"at most {steps}."
        )
    if steps % every:
        LOG.warning(
            "The last %d of %d steps change nothing: %d batches make an update.",
            steps % every,
            steps,
            every,
        )
    own = one_cycle_sgd(learning_rate, -(-steps // every), clip=clip) if tx is None else tx
    return own if every == 1 else optax.MultiSteps(own, every).gradient_transformation()
