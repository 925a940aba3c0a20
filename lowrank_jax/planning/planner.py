"""`plan`: from a network, a little unlabelled data and a budget to the rank of every layer."""

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lowrank_jax.calibration.collecting import Calibration, calibrate
from lowrank_jax.calibration.inputs import shapes_of
from lowrank_jax.factorization.parallel import side_by_side
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.strips import Strips, whitened_spectrum
from lowrank_jax.io.progress import Progress
from lowrank_jax.planning.budget import Budget
from lowrank_jax.planning.candidates import Candidates, candidates
from lowrank_jax.planning.leaves import leaves_of
from lowrank_jax.planning.measured import timed
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.selectors import total_energy
from lowrank_jax.planning.spectra import Spectra, check_forms, restrict, spectra
from lowrank_jax.program.compiler import default_options
from lowrank_jax.program.jaxprs import check_options
from lowrank_jax.tree.kinds import check_unread

if TYPE_CHECKING:
    from lowrank_jax.tuning.timer import Timer

_Sums = Mapping[str, Mapping[tuple[int, ...], Strips]]
LATENCY = "read for a budget of latency alone; leave it out, or give latency=0.5."
_KNOWN: "weakref.WeakKeyDictionary[Calibration, Spectra]" = weakref.WeakKeyDictionary()


def plan(
    source: Calibration | Callable,
    variables: Any = None,
    inputs: Any = None,
    *args: Any,
    macs: int | float | None = None,
    parameters: int | float | None = None,
    bytes: int | float | None = None,
    latency: float | None = None,
    batch: int = 1,
    timer: "Timer | None" = None,
    multiple: int | None = None,
    forms: Iterable[str] | None = None,
    select: Callable[[Candidates, Budget], Plan] = total_energy,
    **kwargs: Any,
) -> Plan:
    """Chooses the rank of every layer within a budget, by what its outputs lose on data.

    ``plan(calibration, macs=0.5)`` takes what `calibrate` gave; the singular values are found once
    for all its plans. ``plan(apply, variables, inputs, *args, macs=0.5, **kwargs)`` calibrates
    first.

    Args:
        source: a `Calibration`, or the function of (variables, *inputs, *args, **kwargs).
        variables, inputs, *args, **kwargs: as in `calibrate`, where the source is a function.
        macs, parameters, bytes, latency: the budget, exactly one of them, of one image; a float up
            to 1 is a share of the dense network's cost, an int is absolute. For latency the layers
            are measured on this device, dense and at a few ranks. No layer gets a rank at which it
            is slower than dense.
        batch: how many images are to run at once, for latency.
        timer: the `Timer` that measures the layers; keep it to measure each layer once.
        multiple: ranks are restricted to multiples of this number. None means 8 on an accelerator,
            so that its matrix units are filled, and 1 on a CPU.
        forms: names of the forms that a layer may have, such as ("vertical", "horizontal") for
            `Separable` alone; None for all. A layer that allows none of the named forms, such as a
            matrix product, has its usual form.
        select: a selector of `lowrank_jax.planning.selectors`, a function of candidates and a
            budget.

    Returns:
        The plan. It prints as a table, and `decompose` and `compress` take it.

    Raises:
        ValueError: there is no budget or more than one, the budget is below the least possible, an
            argument would not be read, a form is unknown, the selector is no function, no layer can
            be decomposed, or `calibrate` refuses the arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Conv(16, (3, 3))])
        >>> images = jax.random.normal(jax.random.key(1), (4, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), images)
        >>> chosen = plan(model.apply, variables, images, macs=0.5)
        >>> chosen.ranks["layers_0"].rank, chosen.total("macs")
        (8, (73728, 36864))
    """
    check_options(plan, None if isinstance(source, Calibration) else source, kwargs)
    if isinstance(source, Calibration) and isinstance(variables, int | float):
        raise ValueError(
            f"plan(calibration, {variables}) does not say what {variables} is of; give the budget "
            f"by its name, such as macs={variables}."
        )
    budget = one_budget(macs=macs, parameters=parameters, bytes=bytes, latency=latency)
    if budget.measure != "latency":
        check_unread(LATENCY, batch=(batch, 1), timer=(timer, None))
    wanted = None if forms is None else check_forms(forms)
    if not isinstance(source, Calibration):
        source = calibrate(source, variables, inputs, *args, **kwargs)
    elif variables is not None or inputs is not None or args or kwargs:
        raise ValueError(
            "plan of a calibration takes a budget alone, plan(calibration, macs=0.5); the "
            "arguments of the model were given to calibrate."
        )
    step = usual_multiple() if multiple is None else multiple
    known = calibrated_spectra(source)
    allowed = known if wanted is None else restrict(known, source.trace, wanted)
    table = candidates(source.trace, allowed, step, layer_weights(source))
    if budget.measure == "latency":
        table = timed(table, _latencies(source, batch, timer, list(table.layers), step))
    chosen = _checked_selector(select)(table, budget)
    return dataclasses.replace(chosen, leaves=leaves_of(source.network.variables))


def _checked_selector(select: Any) -> Callable[[Candidates, Budget], Plan]:
    if callable(select):
        return select
    raise ValueError(
        f"select={select!r} is not allowed; give a function of candidates and a budget, such as "
        "lowrank_jax.planning.selectors.log_energy."
    )


def usual_multiple() -> int:
    """The number of which the ranks are multiples on this device.

    Example:
        >>> usual_multiple() in (1, 8)
        True
    """
    return 1 if jax.default_backend() == "cpu" else 8


def one_budget(**given: int | float | None) -> Budget:
    """The budget of the one measure that is not None.

    Raises:
        ValueError: there is no budget, or more than one.

    Example:
        >>> one_budget(macs=0.5, parameters=None)
        Budget(measure='macs', amount=0.5)
    """
    budgets = [Budget(name, amount) for name, amount in given.items() if amount is not None]
    if len(budgets) != 1:
        got = " and ".join(budget.measure for budget in budgets) or "none of these"
        raise ValueError(f"plan needs exactly one budget, {', '.join(given)}; got {got}.")
    return budgets[0]


def _latencies(
    found: Calibration, batch: int, timer: "Timer | None", paths: list[str], multiple: int
) -> dict[str, dict[Scheme | None, float]]:
    from lowrank_jax.tuning.latency import layer_seconds  # loads with this budget alone
    from lowrank_jax.tuning.timer import Timer

    together = found.network.trace(shapes_of(found.inputs.first(), batch))
    return layer_seconds(together, timer or Timer(default_options()), paths, multiple)


def calibrated_spectra(found: Calibration) -> Spectra:
    """Singular values of the layers in which a rank leaves out what their outputs lose.

    A layer whose inputs were not seen, such as a layer within a branch that no input takes, has the
    singular values of its kernel.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3))]), jnp.ones((4, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> calibrated_spectra(calibrate(model.apply, variables, images)).values["layers_0"].keys()
        dict_keys(['vertical', 'horizontal', 'spatial', 'pointwise'])
    """
    if found not in _KNOWN:
        _KNOWN[found] = _spectra(found)
    return _KNOWN[found]


def layer_weights(found: Calibration) -> dict[str, float]:
    """How much the relative error of each layer counts in a plan; one on the average.

    To second order, an error of a layer costs the network's outputs c = sum over channels of F_nn
    times the squared error, where errors of two channels do not agree. That holds for small errors
    alone, and later layers are fitted to make up for the error. So the weight is the root of c at
    an error of 1, between no weight and c itself.
    """
    costs = {}
    for path, own in _reached(found).items():
        if path not in found.curvature:
            continue
        curvature = found.curvature[path]
        variance = np.mean([strips.variance.ravel() for strips in own.values()], axis=0)
        diagonal = np.diagonal(curvature, axis1=1, axis2=2).ravel()
        costs[path] = math.sqrt(float(diagonal @ variance))
    mean = sum(costs.values()) / max(len(costs), 1)
    return {path: cost / mean for path, cost in costs.items()} if mean else {}


def _spectra(found: Calibration) -> Spectra:
    seen = _reached(found)
    unseen = [path for path in found.trace.safe_paths() if path not in seen]
    values = dict(spectra(found.network.variables, found.trace, unseen).values) if unseen else {}
    jobs, sizes = {}, []  # type: ignore[var-annotated]
    for path, first, kernel, moments in _matrices(found, seen):
        use, importance = found.trace.at(path)[0], found.importance.get(path)
        jobs[len(jobs), path, first] = functools.partial(
            whitened_spectrum, kernel, moments, use.scheme(1, first), importance
        )
        sizes.append(kernel.size)
    with Progress("singular values", len(jobs)) as progress:

        def counted(_: int, found: np.ndarray) -> np.ndarray:
            progress.update()
            return found

        results = side_by_side(list(jobs.values()), sizes, counted)
    rows: dict[str, dict[str, list]] = {}
    for (_, path, first), own in zip(jobs, results, strict=True):
        rows.setdefault(path, {}).setdefault(first, []).append(own)
    for path, orders in rows.items():
        values[path] = {first: np.concatenate(parts) for first, parts in orders.items()}
    return Spectra(values)


def _reached(found: Calibration) -> _Sums:
    """The sums of the layers that some inputs reached; a branch may never be taken."""
    moments = found.moments.items()
    return {path: own for path, own in moments if all(strips.count for strips in own.values())}


def _matrices(found: Calibration, seen: _Sums) -> Iterator[tuple[str, str, np.ndarray, Strips]]:
    """Path, form, kernel and moments of every kernel of every stack."""
    leaves = found.network.named()
    for path, slices in seen.items():
        use = found.trace.at(path)[0]
        for index, strips in slices.items():
            kernel = np.asarray(leaves[path][index])
            for first in use.forms:
                yield path, first, kernel, strips
