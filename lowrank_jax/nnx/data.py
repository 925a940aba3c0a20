"""The verbs that need data, for models of NNX."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, TypeVar

from flax import nnx

from lowrank_jax.calibration.batch_norm import data_statistics
from lowrank_jax.calibration.collecting import Calibration
from lowrank_jax.calibration.collecting import calibrate as calibrate_function
from lowrank_jax.calibration.inputs import Inputs
from lowrank_jax.compression.compressing import compress as compress_function
from lowrank_jax.modules.nnx import dense_form, raw_value, variables_of
from lowrank_jax.modules.surgery import rebuilt
from lowrank_jax.nnx.forms import Call, evaluated, functional
from lowrank_jax.planning.planner import plan as plan_function
from lowrank_jax.planning.plans import Plan
from lowrank_jax.program.transform import lowrank

if TYPE_CHECKING:
    from lowrank_jax.tuning.search import Fast

Model = TypeVar("Model")


def calibrate(
    model: nnx.Module,
    inputs: Any,
    *args: Any,
    paths: Collection[str] | None = None,
    **kwargs: Any,
) -> Calibration:
    """`lowrank_jax.calibrate` of ``model(*inputs, *args, **kwargs)`` in evaluation.

    Args:
        model: dense; it is not changed.
        inputs, *args, paths, **kwargs: as in `lowrank_jax.calibrate`.

    Raises:
        ValueError: as `lowrank_jax.calibrate` says, or the model cannot be called.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> found = calibrate(model, jnp.ones((4, 8, 8, 4)))
        >>> found.images, plan(found, macs=0.5).ranks["layers/0"].rank
        (4, 4)
    """
    return calibrate_function(*functional(model), inputs, *args, paths=paths, **kwargs)


def plan(source: nnx.Module | Calibration, inputs: Any = None, *args: Any, **kwargs: Any) -> Plan:
    """`lowrank_jax.plan` of a model, or of what `calibrate` gave.

    Args:
        source: the model, or a `Calibration` of it.
        inputs, *args: as in `calibrate`, where the source is a model.
        **kwargs: the budget and all other options of `lowrank_jax.plan`.

    Raises:
        ValueError: as `lowrank_jax.plan` says.

    Example:
        >>> import jax
        >>> model = nnx.Sequential(nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)))
        >>> chosen = plan(model, jax.random.normal(jax.random.key(1), (4, 8, 8, 8)), macs=0.5)
        >>> chosen.ranks["layers/0"].rank, chosen.total("macs")
        (8, (73728, 36864))
    """
    if isinstance(source, Calibration):
        given = () if inputs is None else (inputs,)
        return plan_function(source, *given, *args, **kwargs)
    return plan_function(*functional(source), inputs, *args, **kwargs)


def compress(source: nnx.Module | Calibration, *args: Any, **kwargs: Any) -> Any:
    """Makes a new model, decomposed so that its outputs, not its kernels, change least.

    ``compress(calibration, table)`` takes what `calibrate` of this module gave. ``compress(model,
    inputs, table, *args, **kwargs)`` takes what `calibrate` takes, and a table.

    Args:
        source: the model, which is not changed, or a `Calibration` of it.
        *args, **kwargs: as in `lowrank_jax.compress`, without variables.

    Returns:
        A model with `SeparableConv` in the places that the table names, and with the means that the
        fit corrected. The new model is in the mode of the model given. With ``return_fits`` also
        the fits.

    Raises:
        ValueError: as `lowrank_jax.compress` says, or the calibration is not of a model of NNX.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Sequential(nnx.Conv(4, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
        >>> small = compress(model, jnp.ones((4, 8, 8, 4)), {"layers/0": 3})
        >>> small.layers[0].kernel.vertical.shape
        (3, 1, 4, 3)
    """
    known = isinstance(source, Calibration)
    model = _model_of(source) if isinstance(source, Calibration) else source
    given = (source,) if known else functional(model)
    found = compress_function(*given, *args, **kwargs)
    if kwargs.get("return_fits"):
        tree, fits = found
        return rebuilt(model, tree), fits
    return rebuilt(model, found)


def _model_of(found: Calibration) -> nnx.Module:
    apply = found.network.apply
    if isinstance(apply, Call):
        return apply.model
    raise ValueError(
        f"The calibration is of the function {apply!r:.80}, not of a model of NNX; give one that "
        "lowrank_jax.nnx.calibrate made, or call lowrank_jax.compress."
    )


def reestimate(model: Model, inputs: Any, *args: Any, **kwargs: Any) -> Model:
    """Makes a new model, in which every `nnx.BatchNorm` has the statistics of the data.

    Means and variances are cumulative over the batches, each layer seeing what the layers before it
    give when they normalise by the batch at hand. All else, such as dropout, is in evaluation.

    Args:
        model: dense or decomposed; neither the model nor its mode is changed.
        inputs: one batch, or an iterable of batches of nearly equal size.
        *args, **kwargs: other arguments of the model. A model whose call tells its normalisations
            what to do needs the arguments of training.

    Raises:
        ValueError: there is no data, the activations are not finite, or the model has no statistics
            or updates none.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.relu)
        >>> reestimate(model, 3 * jnp.ones((2, 8, 8, 4))).layers[0].mean[...].round(5).tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    training = evaluated(model, normalise_by_batch=True)  # type: ignore[arg-type]
    graphdef, variables = nnx.graphdef(dense_form(training)), variables_of(training)
    old = _statistics(training)
    if not old:
        raise ValueError(
            f"The {type(model).__name__} has no nnx.BatchStat to re-estimate; leave it out."
        )

    def run(variables: Any, statistics: Any, *batch: Any) -> Any:
        copy = nnx.merge(graphdef, variables, copy=True)
        nnx.update(copy, statistics)
        copy(*batch, *args, **kwargs)
        return _statistics(copy)

    def update(statistics: Any, *batch: Any) -> Any:
        return lowrank(run)(variables, statistics, *batch)

    new = nnx.clone(model)
    nnx.update(new, data_statistics(update, old, Inputs(inputs)))
    return new


def _statistics(model: Any) -> dict:
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat), raw_value)


def fast(model: nnx.Module, inputs: Any, *args: Any, **kwargs: Any) -> "Fast":
    """`lowrank_jax.fast` of a model in evaluation, dense or decomposed.

    Args:
        model: it is not changed.
        inputs, *args, **kwargs: as in `lowrank_jax.fast`.

    Returns:
        A compiled function of (variables, inputs). The variables are those of `functional`, or
        ``nnx.state(model)``, or None with ``freeze``. ``Fast.load(path, functional(model)[0])``
        restores a saved function.

    Raises:
        ValueError: as `lowrank_jax.fast` says.

    Example:
        >>> import jax.numpy as jnp
        >>> conv, images = nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)), jnp.ones((4, 8, 8, 8))
        >>> run = fast(conv, images, rounds=2, limit=1)
        >>> run(functional(conv)[1], images).shape
        (4, 8, 8, 16)
    """
    from lowrank_jax.tuning.search import fast as fast_function  # loads with this verb alone

    return fast_function(*functional(model), inputs, *args, **kwargs)
