"""What every layer may become, with cost and error: the table that selectors choose from."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lowrank_jax.factorization.axes import same_form
from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.tucker import Tucker
from lowrank_jax.planning.budget import Budget, check_budget, check_measure, number
from lowrank_jax.planning.costs import Candidate, at_ranks
from lowrank_jax.planning.plans import Choice, Plan, Rest
from lowrank_jax.planning.spectra import Spectra, known_use
from lowrank_jax.planning.tucker_ranks import at_pairs, tucker_forms, tucker_front
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tree.kinds import whole

COUNTS = ("parameters", "macs", "bytes")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Candidates:
    """The candidates of every layer of a traced program, the dense one first.

    Attributes:
        trace: the traced program, which tells the costs.
        spectra: singular values of the layers, which tell the errors.
        layers: path to its candidates; the other layers of the program stay as they are.
        weights: path to how much the error of a layer counts; 1 where there is none.
    """

    trace: Trace
    spectra: Spectra
    layers: Mapping[str, tuple[Candidate, ...]]
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def rest(self, measure: str) -> float:
        """Cost of the layers that stay as they are; 0 for latency, which is not measured."""
        others = [use for use in self.trace if use.path not in self.layers]
        if check_measure(measure) == "parameters":
            return sum({use.path: use.parameters for use in others if use.path}.values())
        return 0 if measure == "latency" else sum(getattr(use, measure) for use in others)

    def dense(self, measure: str) -> float:
        """Cost of the whole program with every layer dense."""
        return self.rest(measure) + sum(layer[0].cost(measure) for layer in self.layers.values())

    def least(self, measure: str) -> float:
        """Cost of the whole program with every layer at its cheapest."""
        cheapest = (min(each.cost(measure) for each in layer) for layer in self.layers.values())
        return self.rest(measure) + sum(cheapest)

    def known(self, measure: str) -> str:
        """The measure; a ValueError if it is unknown, or a latency that was not measured."""
        if check_measure(measure) == "latency" and math.isnan(self.dense("latency")):
            raise ValueError(
                "The candidates have no latency; call timed(candidates, times) with a table of "
                "measured times."
            )
        return measure

    def room(self, budget: Budget) -> float:
        """What a budget leaves to the layers that may change.

        Raises:
            ValueError: the budget is below the least possible, which the error names.
        """
        measure = self.known(check_budget(budget).measure)
        dense, least, rest = (cost(measure) for cost in (self.dense, self.least, self.rest))
        if (limit := budget.limit(dense)) >= least:
            return limit - rest
        share = math.ceil(1e4 * least / dense) / 1e4  # rounded up, so that it can be asked for
        raise ValueError(
            f"Budget: {budget} cannot be met; the least possible is {number(least)} ({share:.4f} "
            f"of the dense {number(dense)}), of which {number(rest)} belong to layers that stay "
            f"as they are. Raise the budget.{_hint(budget.amount)}"
        )

    def at(self, path: str, scheme: Scheme) -> Candidate:
        """The candidate of any scheme that a layer allows, be it cheaper than dense or not.

        Raises:
            ValueError: the path is unknown, or the scheme does not fit the layer.
        """
        use = known_use(self.trace, path)
        fitting = use.scheme(scheme.rank, scheme.first if scheme.first in use.forms else None)
        if (scheme.axes, scheme.groups) != (fitting.axes, fitting.groups):
            raise ValueError(f"{path}: {scheme} does not fit the program; write {fitting}.")
        first = same_form(use.axes, use.kernel_shape, scheme.first)
        forms = tucker_forms(use) if isinstance(scheme, Tucker) else (first,)
        if missing := set(forms) - set(self.spectra.values.get(path, {})):
            form = min(missing)
            raise ValueError(f"{path}: there is no spectrum of its form {form!r}; add one.")
        scheme, calls = scheme.checked(use.kernel_shape, path), self.trace.at(path)
        weight = self.weights.get(path, 1.0)
        if isinstance(scheme, Tucker):
            return at_pairs(calls, self.spectra, np.array([scheme.ranks]), weight)[0]
        return at_ranks(calls, self.spectra, first, [scheme.rank], weight)[0]

    def plan(
        self, chosen: Mapping[str, Candidate], selector: str, budget: Budget | None = None
    ) -> Plan:
        """The plan of one candidate for each path; a layer that has none stays dense."""
        choices = [
            _choice(path, layer[0], chosen.get(path, layer[0]), self._is_changed(path))
            for path, layer in self.layers.items()
        ]
        rest = Rest(**{measure: int(self.rest(measure)) for measure in COUNTS})
        return Plan(choices=tuple(choices), selector=selector, budget=budget, rest=rest)

    def _is_changed(self, path: str) -> bool:
        """Whether the program changes the kernel of a layer first."""
        return any(use.changed for use in self.trace.at(path))


def candidates(
    trace: Trace,
    spectra: Spectra,
    multiple: int = 1,
    weights: Mapping[str, float] | None = None,
) -> Candidates:
    """Lists dense and every useful rank in each form, for each layer that has a spectrum.

    A rank is useful if it is cheaper than dense by any measure. A layer that runs at more than one
    place or size costs the sum; the kernels of a stack and the groups of a kernel have one rank.

    Args:
        trace: `lowrank_jax.trace` of the forward pass.
        spectra: of `lowrank_jax.planning.spectra.spectra`, or whitened ones.
        multiple: ranks are restricted to multiples of this number, such as 8 for tensor cores.
        weights: path to how much the error of a layer counts, as `layer_weights` gives them.

    Raises:
        ValueError: a path is unknown or unsafe, a spectrum belongs to another kernel, or no rank is
            left.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import lowrank_jax as lr
        >>> from lowrank_jax.planning.spectra import spectra
        >>> from flax import linen as nn
        >>> model, images = nn.Sequential([nn.Conv(16, (3, 3))]), jnp.ones((1, 8, 8, 8))
        >>> variables = model.init(jax.random.key(0), images)
        >>> program = lr.trace(model.apply, variables, images)
        >>> table = candidates(program, spectra(variables["params"], program), multiple=4)
        >>> dense, *low = table.layers["layers_0"]
        >>> [each.scheme.rank for each in low if each.scheme.first == "vertical"]
        [4, 8, 12]
    """
    multiple = whole("multiple", multiple)
    weights = weights or {}
    layers = {
        path: _layer(trace, spectra, path, multiple, weights.get(path, 1.0))
        for path in spectra.values
    }
    if not any(len(layer) > 1 for layer in layers.values()):
        raise ValueError(f"{_why_none(trace, multiple)}:\n{trace}")
    return Candidates(trace=trace, spectra=spectra, layers=layers, weights=weights)


def front(
    layer: Iterable[Candidate], measure: str, loss: Callable[[Candidate], float]
) -> list[Candidate]:
    """The candidates that no other candidate beats, from the cheapest to that of least loss.

    Of candidates that cost and lose the same, the one with the fewest macs and parameters stays.

    Example:
        >>> costs = dict(scheme=None, macs=9, bytes=9)
        >>> dense = Candidate(parameters=9, **costs)
        >>> low = Candidate(parameters=4, error=0.5, **costs)
        >>> bad = Candidate(parameters=5, error=0.6, **costs)
        >>> front([dense, low, bad], "parameters", lambda each: each.error) == [low, dense]
        True
    """
    best: list[Candidate] = []
    for each in sorted(layer, key=lambda c: (c.cost(measure), loss(c), c.macs, c.parameters)):
        if not best or loss(each) < loss(best[-1]):
            best.append(each)
    return best


def _choice(path: str, dense: Candidate, chosen: Candidate, changed: bool) -> Choice:
    pairs: dict[str, Any] = {m: (getattr(dense, m), getattr(chosen, m)) for m in COUNTS}
    times = (dense.latency, chosen.latency)
    latency = None if any(map(math.isnan, times)) else times
    return Choice(
        path=path,
        scheme=chosen.scheme,
        latency=latency,
        error=chosen.error,
        changed=changed,
        **pairs,
    )


def _layer(
    trace: Trace, spectra: Spectra, path: str, multiple: int, weight: float
) -> tuple[Candidate, ...]:
    kernel, calls = known_use(trace, path), trace.at(path)
    macs, moved = sum(call.macs for call in calls), sum(call.bytes for call in calls)
    dense = Candidate(scheme=None, parameters=kernel.parameters, macs=macs, bytes=moved)
    found: dict[tuple, Candidate] = {}  # one of two forms that cost and lose the same is enough
    for first, values in spectra.values[path].items():
        limit = _check_size(kernel, first, values)
        ranks = range(multiple, limit + 1, multiple)
        for low in at_ranks(calls, spectra, first, ranks, weight):
            found.setdefault((low.parameters, low.macs, low.bytes, low.error), low)
    every = [*found.values(), *tucker_front(calls, spectra, multiple, weight)]
    return (dense, *(low for low in every if _is_cheaper(low, dense)))


def _why_none(trace: Trace, multiple: int) -> str:
    """Why no layer has a candidate."""
    if not trace.safe_paths():
        return (
            "No layer can be decomposed, for the reasons in the last column; give another program"
        )
    if multiple > 1:
        return (
            f"No layer has a rank that is a multiple of {multiple} and cheaper than dense; give a "
            "smaller multiple, or a network with larger kernels than these"
        )
    return "No layer has a rank that is cheaper than dense; give a network with larger kernels"


def _is_cheaper(low: Candidate, dense: Candidate) -> bool:
    """By any measure."""
    return any(low.cost(measure) < dense.cost(measure) for measure in COUNTS)


def _check_size(kernel: KernelUse, first: str, values: np.ndarray) -> int:
    """The largest rank of a kernel, or an error if its spectrum has another size."""
    if first not in kernel.forms:
        raise ValueError(
            f"{kernel.path}: a spectrum of the form {first!r} is not allowed; give one of "
            f"{', '.join(map(repr, kernel.forms))}."
        )
    groups = kernel.scheme(1, first).groups
    limit = max_rank(kernel.kernel_shape, groups, kernel.axes, first)
    if values.shape[-1] == limit:
        return limit
    raise ValueError(
        f"{kernel.path}: a spectrum of {values.shape[-1]} values does not fit the kernel "
        f"{kernel.kernel_shape} in the form {first!r}, which has {limit}; compute the spectra from "
        "this network."
    )


def _hint(amount: int | float) -> str:
    """What a small int was probably meant to be."""
    if isinstance(amount, float) or amount > 100:
        return ""
    share = "1.0 for the whole network" if amount == 1 else f"{amount / 100:g} for {amount} %"
    return f" An int is absolute; a share is a float, {share}."
