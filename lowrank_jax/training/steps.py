"""One step of training, as a pure function that the caller compiles."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_jax.factorization.factors import wide
from lowrank_jax.training.arguments import check_kinds
from lowrank_jax.training.augmentation import Augment, parts
from lowrank_jax.training.features import Layers
from lowrank_jax.training.finite import first_not_finite
from lowrank_jax.training.forward import Forward, check_mutable
from lowrank_jax.training.losses import Loss, Name, Term
from lowrank_jax.training.partition import joined
from lowrank_jax.training.state import TrainState
from lowrank_jax.tree.paths import factored_leaves
from lowrank_jax.tuning.algorithms import Choose

Metrics = dict[str, jax.Array]
Step = Callable[..., tuple[TrainState, Metrics]]
RENEWED = "Give TrainState.create renewed=[{!r}], so that none is trained."
GROWN = (
    "A collection that a call extends, as that of Module.sow, cannot be renewed; leave {!r} out of "
    "the variables or of mutable=."
)


def make_step(
    apply: Callable,
    tx: optax.GradientTransformation,
    loss: Loss | Term | Name = "cross_entropy",
    *,
    augment: Augment | None = None,
    average: float | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    teacher_apply: Callable | None = None,
    train_kwargs: Mapping[str, Any] | None = None,
    mutable: Sequence[str] | None = None,
    rngs: Sequence[str] | None = None,
    choose: Choose | None = None,
    **kwargs: Any,
) -> Step:
    """Makes the pure function of one training step.

    Args:
        apply: ``model.apply``, or any function of a tree; kernels may be factors.
        tx: the optimiser that made the state.
        loss: a `Loss`, its name, or a function of what it needs.
        augment: function of (key, batch) to the batch that the networks get.
        average: decay of the moving average of the parameters, such as 0.999, at each update; the
            state must have an average then, and none otherwise. Early updates count more, as in
            (1 + n) / (10 + n) for the n-th. An average is held in float32 or wider.
        dtype: type of the computation, such as ``jnp.bfloat16``; the parameters, the statistics and
            the loss keep their own.
        teacher_apply: the teacher's function, where it is not ``apply``.
        train_kwargs, mutable, rngs: how the network is called in training, where that is not found
            out; see `Forward.of`.
        choose: of the algorithms of convolutions, in training and in the teacher, as
            `lowrank_jax.tuning.running.with_algorithms` takes it.
        **kwargs: arguments of the model itself.

    Returns:
        Function of (state, batch) or, for a loss that needs a teacher, of (state, batch, variables
        of the teacher), to (state, metrics). A batch is a tuple of the network's inputs and the
        labels; a batch that is no tuple has no labels. Metrics are scalars: each term of the loss
        by its name, "loss", the whole, "gradient", the norm, and "not_finite", the number of the
        first parameter whose value or gradient is not finite, or -1. These three are not a term's
        own where a term has such a name.

    Raises:
        ValueError: there is no such loss, or an argument is not allowed; when called, for a state
            with an average that the step does not renew, or the reverse.

    Example:
        >>> tree, tx = {"w": jnp.ones((3, 2))}, optax.sgd(0.1)
        >>> step = make_step(lambda tree, x: x @ tree["w"], tx, "squared_error")
        >>> state = TrainState.create(tree, tx)
        >>> state, metrics = jax.jit(step)(state, (jnp.ones((4, 3)), jnp.zeros((4, 2))))
        >>> float(metrics["loss"]), round(float(state.params["w"][0, 0]), 2)
        (9.0, 0.7)
    """
    check_kinds(locals())
    own = dict(train_kwargs=train_kwargs, mutable=mutable, rngs=rngs, dtype=dtype, choose=choose)
    network = Forward.of(apply, kwargs, **own)  # type: ignore[arg-type]
    master = Forward.of(teacher_apply or apply, kwargs, dtype=dtype, choose=choose)
    wanted = Loss.of(loss)
    check_average(average)

    def step(state: TrainState, batch: Any, teacher: Any = None) -> tuple[TrainState, Metrics]:
        augment_key, call_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        _check_state(state, average)
        check_mutable(mutable, joined(state.params, state.rest))
        given = batch if isinstance(batch, tuple) else (batch,)
        given = given if augment is None else augment(augment_key, given)
        inputs, labels = parts(given)
        _check_labels(wanted, labels)
        layers = _matched_layers(wanted, state)
        known = _Known(layers, labels, *_taught(master, wanted, teacher, inputs, layers))

        def objective(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
            variables = joined(params, state.rest)
            outputs, renewed, noted = network.train(variables, inputs, call_key, layers)
            values = wanted.values(**known.beside(outputs, noted))
            return wanted.total(values), (values, renewed)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (total, (values, renewed)), grads = gradient(state.params)
        norm = optax.tree_utils.tree_norm(jax.tree.map(wide, grads))
        metrics = {**values, "loss": total, "gradient": norm}
        metrics["not_finite"] = first_not_finite(total + norm, state.params, grads)
        update = _update(tx, grads, state, total)
        return _advanced(state, update, renewed, average), metrics

    return step


def _check_labels(loss: Loss, labels: Any) -> None:
    if "labels" in loss.needs and labels is None:
        raise ValueError(
            f"The loss needs {sorted(loss.needs)}, and the batch has no labels; give batches "
            "(inputs, labels), or a loss without them, such as distillation()."
        )


def check_average(average: float | None) -> None:
    """Refuses what is no decay of a moving average.

    Raises:
        ValueError: the average is not between 0 and 1.
    """
    if average is not None and not 0 < average < 1:
        raise ValueError(
            f"average={average!r} is not allowed; give a decay between 0 and 1, such as 0.999."
        )


def _check_state(state: TrainState, average: float | None) -> None:
    """Refuses a state with an average for a step without one, and the reverse."""
    if (state.average is None) != (average is None):
        kept = state.average is not None
        raise ValueError(
            f"average={average!r} of make_step is not allowed for a state of "
            f"TrainState.create(average={kept}); give both an average, or none."
        )


@dataclasses.dataclass(frozen=True)
class _Known:
    """What a loss may need beside the trained network."""

    paths: Sequence[str]  # of the layers whose outputs are wanted
    labels: Any
    teacher: Any
    layers: Layers

    def beside(self, outputs: Any, layers: Layers) -> dict[str, Any]:
        """All that a loss may need, by the names of `NEEDS`."""
        both = layers.keys() & self.layers.keys()
        pairs = {place: (layers[place], self.layers[place]) for place in sorted(both)}
        if self.paths and not pairs:
            paths = sorted({place.path for place in layers}) or sorted(self.paths)
            raise ValueError(
                f"The {'teacher' if layers else 'network'} runs none of the decomposed layers "
                f"{paths} as one convolution or product; give the variables of the dense network "
                "as teacher, or leave the loss 'layers' out."
            )
        return {"outputs": outputs, "labels": self.labels, "teacher": self.teacher, "layers": pairs}


def _matched_layers(loss: Loss, state: TrainState) -> list[str]:
    """The paths of the layers whose outputs the loss needs."""
    if "layers" not in loss.needs:
        return []
    if found := list(factored_leaves(state.variables)):
        return found
    raise ValueError(
        "The loss needs the outputs of decomposed layers, and no layer of the network is "
        "decomposed; leave the loss 'layers' out."
    )


def _taught(
    network: Forward, loss: Loss, variables: Any, inputs: tuple, layers: Sequence[str]
) -> tuple[Any, Layers]:
    """What the teacher gives for a batch, as far as the loss needs it."""
    if not loss.needs & {"teacher", "layers"}:
        return None, {}
    if variables is None:
        raise ValueError(
            f"The loss needs {sorted(loss.needs)}, and there is no teacher; give the variables of "
            "the dense network."
        )
    found = network.evaluate(variables, inputs, layers)
    return jax.lax.stop_gradient(found)


def _renewed(rest: Mapping[str, Any], found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The leaves that stay as they are, with renewed collections in the containers they had."""
    own = {name: _in_place_of(rest[name], value, name) for name, value in found.items()}
    return type(rest)({**rest, **own})  # type: ignore[call-arg]


def _in_place_of(old: Any, new: Any, name: str) -> Any:
    leaves, structure = jax.tree.leaves(new), jax.tree.structure(old)
    fixed = len(jax.tree.leaves(old))
    if len(leaves) != fixed:
        trained = any(leaf is None for leaf in jax.tree.leaves(old, is_leaf=lambda x: x is None))
        raise ValueError(
            f"mutable={name!r}: the call gives {len(leaves)} arrays, and {fixed} are not trained. "
            + (RENEWED if trained else GROWN).format(name)
        )
    pairs = zip(leaves, jax.tree.leaves(old), strict=True)
    return jax.tree.unflatten(structure, [_in_type_of(own, x) for x, own in pairs])


def _in_type_of(old: jax.Array, new: Any) -> jax.Array:
    """A renewed value, which may be a number of Python, in the type that it had."""
    same = getattr(new, "dtype", None) == old.dtype
    return new if same else jnp.asarray(new, old.dtype)


def _update(
    tx: optax.GradientTransformation, grads: Any, state: TrainState, loss: jax.Array
) -> tuple[Any, optax.OptState]:
    """The updates of an optimiser, which may read the loss, and its new state."""
    try:
        update = optax.with_extra_args_support(tx).update
        return update(grads, state.optimizer, state.params, value=loss)
    except TypeError as error:
        if "required keyword-only argument" not in str(error):
            raise
        raise ValueError(
            f"tx={type(tx).__name__}: {error}. A step gives an optimiser the gradients, the "
            "parameters and the loss as value; give an optimiser that needs no more than these."
        ) from error


def _advanced(
    state: TrainState,
    update: tuple[Any, optax.OptState],
    renewed: Mapping[str, Any],
    average: float | None,
) -> TrainState:
    updates, optimizer = update
    params = optax.apply_updates(state.params, updates)
    rest = _renewed(state.rest, renewed) if renewed else state.rest
    mean = None if average is None else _averaged(state, params, optimizer, average)
    step = state.step + 1
    return dataclasses.replace(
        state, step=step, params=params, rest=rest, optimizer=optimizer, average=mean
    )


def _accumulating(optimizer: Any, params: Any) -> list[optax.MultiStepsState]:
    """The states that accumulate the gradients of all parameters, wherever they stand."""

    def is_one(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    count = len(jax.tree.leaves(params))
    found = [node for node in jax.tree.leaves(optimizer, is_leaf=is_one) if is_one(node)]
    return [node for node in found if len(jax.tree.leaves(node.acc_grads)) == count]


def _averaged(state: TrainState, params: Any, optimizer: Any, decay: float) -> Any:
    """The moving average after a step, which is an update unless gradients are accumulated."""
    updates, whole = state.step, True
    if many := _accumulating(optimizer, params):
        before = _accumulating(state.optimizer, params)[0]
        updates, whole = before.gradient_step, many[0].mini_step == 0
    share = 1 - jnp.minimum(decay, (1 + updates) / (10 + updates))
    new = jax.tree.map(lambda x, mean: x.astype(mean.dtype), params, state.average)
    return optax.incremental_update(new, state.average, jnp.where(whole, share, 0))
