"""Selectors: each takes the options of every layer and returns a plan."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from lowrank_jax.factorization.separable import Separable
from lowrank_jax.planning.budget import Budget, check_budget, check_measure, number, solve
from lowrank_jax.planning.candidates import Option, Options, front
from lowrank_jax.planning.evbmf import evbmf_rank
from lowrank_jax.planning.measured import listed, order_and_rank, timed
from lowrank_jax.planning.plans import Choice, Plan
from lowrank_jax.planning.spectra import known_use

Loss = Callable[[str, Option], float]
Layers = Mapping[str, tuple[Option, ...]]


def fixed(options: Options, ranks: Mapping[str, int | Separable]) -> Plan:
    """The ranks given, whether they are among the options or not; every other layer stays dense.

    Raises:
        ValueError: a path is unknown, or a rank does not fit its layer.
    """
    schemes = {
        path: r if isinstance(r, Separable) else _scheme(options, path, r)
        for path, r in ranks.items()
    }
    return _plan(
        options, {path: options.at(path, scheme) for path, scheme in schemes.items()}, "fixed"
    )


def ratio(options: Options, budget: Budget) -> Plan:
    """Every layer at the smallest error within the same share of its own cost; dense where nothing
    is.

    Raises:
        ValueError: the budget is not a share, or no layer can meet it.
    """
    if isinstance(check_budget(budget).amount, int):
        raise ValueError(f"ratio: {budget} is absolute; give a share for every layer, such as 0.5.")
    measure = _known(options, budget.measure)
    within = {
        path: [
            option
            for option in layer
            if option.cost(measure) <= budget.limit(layer[0].cost(measure))
        ]
        for path, layer in options.layers.items()
    }
    if not any(within.values()):
        least = min(
            _share(option, layer, measure) for layer in options.layers.values() for option in layer
        )
        raise ValueError(
            f"ratio: no layer can have {budget}; the least possible is {least:.4g} of a layer."
        )
    chosen = {p: min(w, key=lambda o: (o.error, o.cost(measure))) for p, w in within.items() if w}
    return _plan(options, chosen, "ratio", budget)


def energy(options: Options, share: float, measure: str = "parameters") -> Plan:
    """Every layer at the cheapest option that keeps a share of its squared singular values.

    Raises:
        ValueError: the share is not above 0 and up to 1.
    """
    if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
        raise ValueError(
            f"energy: the share {share!r} is not allowed; give a number above 0 and up to 1, such as 0.95."
        )
    _known(options, measure)

    def cheapest(layer: tuple[Option, ...]) -> Option:
        enough = [option for option in layer if option.error <= 1 - share]
        return min(enough, key=lambda option: (option.cost(measure), option.error))

    return _plan(
        options, {path: cheapest(layer) for path, layer in options.layers.items()}, "energy"
    )


def total_energy(options: Options, budget: Budget) -> Plan:
    """The largest sum over the layers of the share of energy kept, within a budget; see `solve` for
    the optimality.

    Energy is that of the squared singular values: with whitened spectra, of the layers' outputs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import lowrank_jax as lr
        >>> from lowrank_jax.planning.candidates import options
        >>> from lowrank_jax.planning.spectra import spectra
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(8, (3, 3)), nn.Conv(8, (3, 3))]), jnp.ones((1, 8, 8, 4))
        >>> variables = model.init(jax.random.key(0), images)
        >>> uses = lr.trace(model.apply, variables, images)
        >>> plan = total_energy(options(uses, spectra(variables["params"], uses)), Budget("parameters", 0.5))
        >>> plan.total("parameters")
        (864, 432)
    """
    return _search(options, budget, lambda _, option: option.error, "total_energy")


def log_energy(options: Options, budget: Budget) -> Plan:
    """The largest product of the layers' shares of energy, within a budget (Zhang et al., 2015,
    arXiv 1505.06798)."""
    return _search(
        options, budget, lambda _, option: -math.log1p(-min(option.error, 1 - 1e-15)), "log_energy"
    )


def minmax(options: Options, budget: Budget, norm: str = "spectral") -> Plan:
    """The smallest possible maximum over the layers of the relative error, within a budget.

    This is the choice of ALDS (Liebenwein et al., 2021, arXiv 2107.11442). Cost left over at that
    maximum goes to the sum of energies.

    Args:
        options: of every layer.
        budget: of the whole network.
        norm: of the error; "spectral" as in ALDS, or "frobenius".

    Raises:
        ValueError: the budget cannot be met, or the norm is unknown.
    """
    if norm not in ("spectral", "frobenius"):
        raise ValueError(f"minmax: the norm {norm!r} is not known; give 'spectral' or 'frobenius'.")
    limit = _limit(options, budget)
    losses: dict[str, Callable] = {"spectral": lambda o: o.spectral, "frobenius": lambda o: o.error}
    loss = losses[norm]
    fronts = [front(layer, budget.measure, loss) for layer in options.layers.values()]
    levels = sorted({loss(option) for layer in fronts for option in layer})
    low, high = 0, len(levels) - 1
    while low < high:  # the cost falls as the level rises
        middle = (low + high) // 2
        cheapest = [next(o for o in layer if loss(o) <= levels[middle]) for layer in fronts]
        fits = sum(option.cost(budget.measure) for option in cheapest) <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    within = {
        path: tuple(o for o in layer if loss(o) <= levels[low])
        for path, layer in options.layers.items()
    }
    return _search(options, budget, lambda _, option: option.error, "minmax", limit_to=within)


def evbmf(options: Options, measure: str = "parameters") -> Plan:
    """The rank that stands out of the noise in every layer (Nakajima et al., 2013); for plain
    spectra, no budget.

    A layer of several groups or slices gets the largest of their ranks, rounded up to the ranks
    there are, and the order of the factors that is cheaper; it stays dense if that is cheapest.
    """
    _known(options, measure)
    chosen = {path: _by_noise(options, path, measure) for path in options.layers}
    return _plan(options, chosen, "evbmf")


def sensitivity(
    options: Options, divergences: Mapping[str, Mapping[tuple[str, int], float]], budget: Budget
) -> Plan:
    """The smallest sum of the divergences measured with one layer cut at a time, within a budget.

    Args:
        options: of every layer.
        divergences: path, then (first, rank), to the divergence; 0 for dense. Only what is in it is
            chosen from, a layer that is not in it stays dense.
        budget: of the whole network.

    Raises:
        ValueError: a path is unknown, a divergence is no finite number, nothing in the table is an
            option, or the budget cannot be met.
    """

    def loss(path: str, option: Option) -> float:
        return divergences[path][order_and_rank(option.scheme)] if option.scheme else 0.0

    return _search(listed(options, divergences), budget, loss, "sensitivity")


def latency(
    options: Options, times: Mapping[str, Mapping[Separable | None, float]], budget: Budget
) -> Plan:
    """The largest sum of energies within a budget, of the options measured faster than dense; see
    `timed`."""
    return dataclasses.replace(total_energy(timed(options, times), budget), selector="latency")


def _search(
    options: Options, budget: Budget, loss: Loss, name: str, limit_to: Layers | None = None
) -> Plan:
    """The smallest sum of losses within the budget, over some of the options or over all."""
    limit, layers = _limit(options, budget), options.layers if limit_to is None else limit_to
    fronts = {
        path: front(layer, budget.measure, partial(loss, path)) for path, layer in layers.items()
    }
    costs = [
        np.array([option.cost(budget.measure) for option in layer]) for layer in fronts.values()
    ]
    losses = [np.array([loss(path, option) for option in layer]) for path, layer in fronts.items()]
    picks = solve(costs, losses, limit)
    chosen = {path: layer[pick] for (path, layer), pick in zip(fronts.items(), picks, strict=True)}
    return _plan(options, chosen, name, budget)


def _limit(options: Options, budget: Budget) -> float:
    """What the budget leaves to the layers that may change, or an error that says the least
    possible."""
    measure = _known(options, check_budget(budget).measure)
    dense, least, rest = (f(measure) for f in (options.dense, options.least, options.rest))
    limit = budget.limit(dense)
    if least > limit:
        hint = " An int is absolute; write 1.0 for the whole network." if budget.amount == 1 else ""
        share = math.ceil(1e4 * least / dense) / 1e4  # rounded up, so that it can be asked for
        raise ValueError(
            f"Budget: {budget} cannot be met; the least possible is {number(least)} ({share:.4f} of the dense "
            f"{number(dense)}), of which {number(rest)} belong to layers that stay as they are. Raise the budget.{hint}"
        )
    return limit - rest


def _known(options: Options, measure: str) -> str:
    if check_measure(measure) == "latency" and math.isnan(options.dense("latency")):
        raise ValueError(
            "The options have no latency; call timed(options, times) with a table of measured times."
        )
    return measure


def _plan(
    options: Options, chosen: Mapping[str, Option], selector: str, budget: Budget | None = None
) -> Plan:
    choices = tuple(
        _choice(path, layer[0], chosen.get(path, layer[0]))
        for path, layer in options.layers.items()
    )
    rest = tuple(int(options.rest(measure)) for measure in ("parameters", "macs", "bytes"))
    return Plan(choices, selector, budget, rest)  # type: ignore[arg-type]


def _choice(path: str, dense: Option, chosen: Option) -> Choice:
    pairs = {
        name: (getattr(dense, name), getattr(chosen, name))
        for name in ("parameters", "macs", "bytes")
    }
    latency = (dense.latency, chosen.latency)
    known = None if any(map(math.isnan, latency)) else latency
    return Choice(path, chosen.scheme, error=chosen.error, latency=known, **pairs)


def _scheme(options: Options, path: str, rank: int) -> Separable:
    return known_use(options.trace, path).scheme(rank)


def _share(option: Option, layer: tuple[Option, ...], measure: str) -> float:
    return option.cost(measure) / layer[0].cost(measure)


def _by_noise(options: Options, path: str, measure: str) -> Option:
    use, layer = options.trace.at(path)[0], options.layers[path]
    found = []
    for first, matrices in options.spectra.values[path].items():
        entries = math.prod(use.kernel_shape[-len(use.axes) :]) // use.groups
        rank = max(1, *(evbmf_rank(values, entries // len(values)) for values in matrices))
        found += [
            o for o in layer if o.scheme and o.scheme.first == first and o.scheme.rank >= rank
        ][:1]
    return min([layer[0], *found], key=lambda option: (option.cost(measure), option.error))
