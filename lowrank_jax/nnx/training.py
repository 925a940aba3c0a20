"""`finetune` for models of NNX."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from flax import nnx, traverse_util

from lowrank_jax.modules.nnx import dense_form, raw_value
from lowrank_jax.modules.surgery import rebuilt
from lowrank_jax.nnx.forms import evaluated
from lowrank_jax.program.jaxprs import check_options

if TYPE_CHECKING:
    from lowrank_jax.training.runs import AfterEpoch

Model = TypeVar("Model")
PARAMS, STATE = "params", "state"  # the parameters, and all other variables


def finetune(
    model: Model,
    batches: Any,
    *,
    teacher: nnx.Module | None = None,
    training_mode: bool = True,
    after_epoch: "AfterEpoch | None" = None,
    **options: Any,
) -> Model:
    """`lowrank_jax.finetune` of a model, dense or decomposed.

    The model trains as ``model.train()`` makes it: normalisations and random numbers keep the state
    that training gives them. Without ``training_mode`` it is called as ``model.eval()`` makes it,
    so that statistics stay and dropout is off.

    Args:
        model: it is not changed.
        batches: as in `lowrank_jax.finetune`.
        teacher: the dense model, for a loss that needs it.
        training_mode: whether normalisations and dropout are in the mode of training.
        after_epoch: called with (epoch from 1, model, mean metrics) after each epoch.
        **options: as in `lowrank_jax.finetune`, arguments of the model's call among them.

    Returns:
        A trained model, in the mode of the model given.

    Raises:
        FloatingPointError, OSError, SystemExit, ValueError: as `lowrank_jax.finetune` does.
        ValueError: an option is known neither there nor by the model, or is set here.

    Example:
        >>> import jax.numpy as jnp
        >>> from lowrank_jax.nnx import decompose
        >>> dense = nnx.Sequential(nnx.Linear(9, 8, rngs=nnx.Rngs(0)), nnx.relu)
        >>> data = jnp.ones((8, 9)), jnp.zeros(8, int)
        >>> tuned = finetune(decompose(dense, {"layers/0": 2}), data, steps=3, batch_size=4)
        >>> tuned(data[0]).shape
        (8, 8)
    """
    from lowrank_jax.training.finetuning import finetune as finetune_function  # with this verb

    _check(options, finetune_function, model)

    def made(variables: Mapping[str, Any]) -> Model:
        return rebuilt(model, _joined(variables))

    def after(epoch: int, variables: Any, metrics: Mapping[str, float]) -> Any:
        return after_epoch(epoch, made(variables), metrics) if after_epoch else None

    if teacher is not None:
        options |= {"teacher": _collections(teacher), "teacher_apply": Training(teacher)}
    given = Training(model, training_mode), _collections(model), batches
    return made(
        finetune_function(
            *given, mutable=[STATE], after_epoch=after if after_epoch else None, **options
        )
    )


def _check(options: Mapping[str, Any], verb: Callable, model: Any) -> None:
    for name in ("mutable", "rngs", "teacher_apply"):
        if name in options:
            raise ValueError(
                f"{name}={options[name]!r:.80} is not allowed for a model of NNX, whose variables "
                "and random numbers are its own; leave it out."
            )
    own = inspect.signature(verb).parameters
    check_options(verb, model, [name for name in options if name not in own])


class Training:
    """``call(variables, *args, mutable=(), **kwargs)``: a model in evaluation, or as it trains.

    The variables are two collections, of parameters and of all else. With ``mutable`` the model
    trains, and the call gives (outputs, collections that changed), as Linen does.

    Args:
        model: it is not changed.
        training_mode: whether it trains in the mode of ``model.train()``.
    """

    def __init__(self, model: Any, training_mode: bool = True) -> None:
        trained = evaluated(model)
        if training_mode:
            trained.train()
        self._trains = nnx.graphdef(dense_form(trained))
        self._evaluates = nnx.graphdef(dense_form(evaluated(model)))

    def __call__(self, variables: Any, *args: Any, mutable: Any = (), **kwargs: Any) -> Any:
        graphdef = self._trains if mutable else self._evaluates
        copy = nnx.merge(graphdef, _joined(variables), copy=True)
        outputs = copy(*args, **kwargs)
        return (outputs, {STATE: _collections(copy)[STATE]}) if mutable else outputs


def _collections(model: Any) -> dict[str, dict]:
    params, _, rest = nnx.state(model, nnx.Param, nnx.Intermediate, ...)  # none that was sown
    return {
        PARAMS: nnx.to_pure_dict(params, raw_value),
        STATE: nnx.to_pure_dict(rest, raw_value),
    }


def _joined(variables: Mapping[str, Any]) -> dict:
    """One tree of all variables, as `rebuilt` takes it."""
    flat = [traverse_util.flatten_dict(variables[name]) for name in (PARAMS, STATE)]
    return traverse_util.unflatten_dict({**flat[0], **flat[1]})
