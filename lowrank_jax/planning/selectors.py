"""Selectors: each takes the candidates of every layer and returns a plan.

Example:
    Two layers, dense or at rank 1, of which the second loses less:

    >>> from lowrank_jax.factorization.separable import Separable
    >>> from lowrank_jax.planning.spectra import Spectra
    >>> from lowrank_jax.program.kernel_use import Trace
    >>> dense = Candidate(scheme=None, parameters=9, macs=90, bytes=99)
    >>> low = dict(scheme=Separable(1), parameters=3, macs=30, bytes=33)
    >>> one = (dense, Candidate(error=0.4, spectral=0.6, **low))
    >>> two = (dense, Candidate(error=0.1, spectral=0.3, **low))
    >>> layers = {"one": one, "two": two}
    >>> table = Candidates(trace=Trace(()), spectra=Spectra({}), layers=layers)

    Within two thirds of the macs, these three selectors decompose the second layer:

    >>> budget = Budget("macs", 2 / 3)
    >>> [list(select(table, budget).ranks) for select in (total_energy, log_energy, minmax)]
    [['two'], ['two'], ['two']]
    >>> list(ratio(table, budget).ranks), list(energy(table, 0.8).ranks)
    (['one', 'two'], ['two'])
"""

import bisect
import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import numpy as np

from lowrank_jax.factorization.axes import kernel_size
from lowrank_jax.planning.budget import Budget, check_budget
from lowrank_jax.planning.candidates import Candidate, Candidates, front
from lowrank_jax.planning.knapsack import solve
from lowrank_jax.planning.measured import Divergences, Times, listed, order_and_rank, timed
from lowrank_jax.planning.plans import Plan
from lowrank_jax.planning.variational import evbmf_rank
from lowrank_jax.tree.rules import Rules, resolve

Loss = Callable[[str, Candidate], float]
Layers = Mapping[str, tuple[Candidate, ...]]


def fixed(candidates: Candidates, rules: Rules) -> Plan:
    """What a table of ranks or rules costs and loses; the ranks need not be among the candidates.

    Args:
        candidates: of every layer.
        rules: as for `lowrank_jax.tree.rules.resolve`; what no rule matches stays dense.

    Raises:
        ValueError: a rule matches no layer, or a rank does not fit its layer.
    """
    schemes = resolve(rules, candidates.trace)
    chosen = {path: candidates.at(path, scheme) for path, scheme in schemes.items()}
    return candidates.plan(chosen, "fixed")


def ratio(candidates: Candidates, budget: Budget) -> Plan:
    """Each layer at the smallest error within the same share of its own cost, or else dense.

    Raises:
        ValueError: the budget is not a share, or no layer can meet it.
    """
    if isinstance(check_budget(budget).amount, int):
        raise ValueError(f"ratio: {budget} is absolute; give a share for every layer, such as 0.5.")
    measure, chosen = candidates.known(budget.measure), {}
    cost = operator.attrgetter(measure)
    for path, layer in candidates.layers.items():
        if within := [each for each in layer if cost(each) <= budget.limit(cost(layer[0]))]:
            chosen[path] = min(within, key=lambda each: (each.error, cost(each)))
    if chosen:
        return candidates.plan(chosen, "ratio", budget)
    least = min(cost(c) / cost(layer[0]) for layer in candidates.layers.values() for c in layer)
    raise ValueError(
        f"ratio: no layer can have {budget}; the least possible is {least:.4g} of a layer. "
        "Raise it."
    )


def energy(candidates: Candidates, share: float, measure: str = "parameters") -> Plan:
    """Each layer at the cheapest candidate that keeps a share of its squared singular values.

    Args:
        candidates: of every layer.
        share: above 0 and up to 1.
        measure: the cost by which the cheapest candidate is chosen.

    Raises:
        ValueError: the share is not above 0 and up to 1.
    """
    if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
        raise ValueError(
            f"energy: the share {share!r} is not allowed; give a number above 0 and up to 1, such "
            "as 0.95."
        )
    key = operator.attrgetter(candidates.known(measure), "error")
    chosen = {
        path: min((each for each in layer if each.error <= 1 - share), key=key)
        for path, layer in candidates.layers.items()
    }
    return candidates.plan(chosen, "energy")


def total_energy(candidates: Candidates, budget: Budget) -> Plan:
    """The smallest sum over the layers of the share of energy left out, within a budget.

    Energy is that of the squared singular values: with whitened spectra, of the layers' outputs.
    Each layer counts by its weight, see `layer_weights` of `lowrank_jax.planning.planner`.
    `lowrank_jax.planning.knapsack.solve` says how near the plan is to the optimum.

    Raises:
        ValueError: the budget cannot be met.
    """
    return _search(candidates, budget, _loss, "total_energy")


def log_energy(candidates: Candidates, budget: Budget) -> Plan:
    """The largest product of the layers' shares of energy (Zhang et al., 2015, arXiv 1505.06798).

    Raises:
        ValueError: the budget cannot be met.
    """

    def loss(path: str, each: Candidate) -> float:
        return -math.log1p(-min(each.error, 1 - 1e-15))

    return _search(candidates, budget, loss, "log_energy")


def minmax(
    candidates: Candidates, budget: Budget, norm: Literal["spectral", "frobenius"] = "spectral"
) -> Plan:
    """The smallest possible maximum over the layers of the relative error, within a budget.

    This is the choice of ALDS (Liebenwein et al., 2021, arXiv 2107.11442). Cost left over at that
    maximum goes to the sum of energies.

    Args:
        candidates: of every layer.
        budget: of the whole network.
        norm: of the error; "spectral" as in ALDS, or "frobenius".

    Raises:
        ValueError: the budget cannot be met, or the norm is unknown.
    """
    if norm not in ("spectral", "frobenius"):
        raise ValueError(f"minmax: the norm {norm!r} is not known; give 'spectral' or 'frobenius'.")
    loss = operator.attrgetter("spectral" if norm == "spectral" else "error")
    cost, room = operator.attrgetter(check_budget(budget).measure), candidates.room(budget)
    fronts = [front(layer, budget.measure, loss) for layer in candidates.layers.values()]
    levels = sorted({loss(each) for layer in fronts for each in layer})

    def fits(level: float) -> bool:
        cheapest = [next(each for each in layer if loss(each) <= level) for layer in fronts]
        return sum(map(cost, cheapest)) <= room

    level = levels[bisect.bisect_left(levels, True, key=fits)]  # the cost falls as it rises
    within = {
        path: tuple(each for each in layer if loss(each) <= level)
        for path, layer in candidates.layers.items()
    }
    return _search(candidates, budget, _error, "minmax", within)


def evbmf(candidates: Candidates, measure: str = "parameters") -> Plan:
    """The rank that stands out of the noise in each layer (Nakajima et al., 2013).

    It takes plain spectra and no budget. A layer of many groups or slices gets the largest of their
    ranks, rounded up to a rank among the candidates, and the cheaper order of the factors. It stays
    dense if dense is cheapest.

    Args:
        candidates: of every layer, with plain spectra.
        measure: the cost by which the cheapest candidate is chosen.
    """
    key = operator.attrgetter(candidates.known(measure), "error")
    chosen = {
        path: min((layer[0], *_out_of_noise(candidates, path)), key=key)
        for path, layer in candidates.layers.items()
    }
    return candidates.plan(chosen, "evbmf")


def sensitivity(candidates: Candidates, divergences: Divergences, budget: Budget) -> Plan:
    """The smallest sum of the divergences measured with one layer at a time, within a budget.

    Args:
        candidates: of every layer.
        divergences: path, then (first, rank), to the divergence; 0 for dense. Only candidates in
            this table are chosen from; a layer that is not in the table stays dense.
        budget: of the whole network.

    Raises:
        ValueError: a path is unknown, a divergence is no finite number, nothing in the table is a
            candidate, or the budget cannot be met.
    """

    def loss(path: str, each: Candidate) -> float:
        return divergences[path][order_and_rank(each.scheme)] if each.scheme else 0.0

    return _search(listed(candidates, divergences), budget, loss, "sensitivity")


def latency(candidates: Candidates, times: Times, budget: Budget) -> Plan:
    """The largest sum of energies within a budget, of what `timed` says is faster than dense.

    Args:
        candidates: of every layer.
        times: measured times, as `timed` takes them.
        budget: of latency, for the measured layers.

    Raises:
        ValueError: a path or a time is not allowed, or the budget cannot be met.
    """
    plan = total_energy(timed(candidates, times), budget)
    return dataclasses.replace(plan, selector="latency")


def _error(path: str, each: Candidate) -> float:
    return each.error


def _loss(path: str, each: Candidate) -> float:
    return each.loss


def _search(
    candidates: Candidates, budget: Budget, loss: Loss, name: str, within: Layers | None = None
) -> Plan:
    """The smallest sum of losses within the budget, over some of the candidates or over all."""
    room = candidates.room(budget)
    layers = candidates.layers if within is None else within
    fronts = {
        path: front(layer, budget.measure, partial(loss, path)) for path, layer in layers.items()
    }
    costs = [np.array([c.cost(budget.measure) for c in layer]) for layer in fronts.values()]
    losses = [np.array([loss(path, each) for each in layer]) for path, layer in fronts.items()]
    picks = solve(costs, losses, room)
    chosen = {path: layer[pick] for (path, layer), pick in zip(fronts.items(), picks, strict=True)}
    return candidates.plan(chosen, name, budget)


def _out_of_noise(candidates: Candidates, path: str) -> list[Candidate]:
    """For each order of the factors the lowest candidate of a rank that no signal exceeds."""
    kernel, found = candidates.trace.at(path)[0], []
    size = kernel_size(kernel.axes, kernel.kernel_shape)
    for first, matrices in candidates.spectra.values[path].items():
        entries = size // kernel.scheme(1, first).groups
        rank = max(1, *(evbmf_rank(values, entries // len(values)) for values in matrices))
        found += [
            each
            for each in candidates.layers[path]
            if each.scheme and each.scheme.name == first and each.scheme.rank >= rank
        ][:1]
    return found
