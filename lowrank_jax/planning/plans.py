"""A plan: what becomes of every layer, with its predicted cost and error, as plain data."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lowrank_jax.factorization.axes import split_axes
from lowrank_jax.factorization.forms import SCHEMES
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.tucker import Tucker
from lowrank_jax.io.atomic import whole_file
from lowrank_jax.io.missing import check_exists
from lowrank_jax.planning.budget import Budget, check_measure, number
from lowrank_jax.planning.leaves import Leaf
from lowrank_jax.program.kernel_use import table

VERSION = 2
Pair = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What becomes of one layer.

    Attributes:
        path: of the layer.
        scheme: its decomposition; None if it stays dense.
        parameters, macs, bytes: (dense, chosen).
        latency: (dense, chosen) in seconds; None if it was not measured.
        error: predicted, the share of the squared singular values that is left out.
        changed: whether the kernel is the stored one as the program changes it; see `KernelUse`.

    Example:
        >>> Choice(path="conv", scheme=None, parameters=(9, 9), macs=(9, 9), bytes=(9, 9)).error
        0.0
    """

    path: str
    scheme: Scheme | None
    parameters: Pair
    macs: Pair
    bytes: Pair
    latency: Pair | None = None
    error: float = 0.0
    changed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rest:
    """Cost of the layers of a program that stay as they are.

    Example:
        >>> Rest(parameters=100, macs=1000).bytes
        0
    """

    parameters: int = 0
    macs: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The choices of one selector; prints as a table.

    Attributes:
        choices: one for each layer that could be decomposed, in program order.
        selector: name of the function that chose.
        budget: what was asked; None if the selector takes no budget.
        rest: cost of the other layers of the traced program, which stay.
        leaves: of the dense tree, where it is of nested dicts; see `skeleton`.

    Example:
        >>> from lowrank_jax import Separable
        >>> costs = dict(parameters=(600, 200), macs=(6000, 2000), bytes=(40, 30))
        >>> choice = Choice(path="Conv_0", scheme=Separable(4), error=0.125, **costs)
        >>> rest, budget = Rest(parameters=100, macs=1000), Budget("parameters", 0.5)
        >>> plan = Plan(choices=(choice,), selector="total_energy", budget=budget, rest=rest)
        >>> plan.ranks["Conv_0"].rank, plan.total("parameters")
        (4, (700, 300))
        >>> print(plan)
        layer         first     rank  parameters  low-rank           macs  low-rank          error
        Conv_0        vertical     4         600       200  33.3 %  6,000     2,000  33.3 %  0.1250
        other layers                         100       100   100 %  1,000     1,000   100 %
        total                                700       300  42.9 %  7,000     3,000  42.9 %
        total_energy, at most 0.5 of the dense parameters: 300, 42.9 %
    """

    choices: tuple[Choice, ...]
    selector: str
    budget: Budget | None = None
    rest: Rest = Rest()
    leaves: tuple[Leaf, ...] = ()

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    @property
    def ranks(self) -> dict[str, Scheme]:
        """The table for `lowrank_jax.decompose`: the layers that do not stay dense."""
        return {choice.path: choice.scheme for choice in self if choice.scheme}

    @property
    def changed(self) -> tuple[str, ...]:
        """The layers whose factors are of the kernel as the program changes it, for evaluation."""
        return tuple(choice.path for choice in self if choice.scheme and choice.changed)

    def total(self, measure: str) -> Pair:
        """The (dense, chosen) cost of the whole program; the latency is of the measured layers.

        Raises:
            ValueError: the measure is not known, or it is the latency and was not measured.
        """
        pairs = [getattr(choice, check_measure(measure)) for choice in self]
        if None in pairs:
            raise ValueError(
                "The plan has no latency; choose it from candidates with measured times, as timed "
                "gives them."
            )
        dense, chosen = (sum(column) for column in zip(*pairs, self._rest(measure), strict=True))
        return dense, chosen

    def _rest(self, measure: str) -> Pair:
        cost = getattr(self.rest, measure, 0)
        return cost, cost

    def __str__(self) -> str:
        shown = ["parameters", "macs"]
        if self.budget and self.budget.measure not in shown:
            shown.append(self.budget.measure)
        heads = [text for measure in shown for text in (measure, "low-rank", "")]
        rows = [("layer", "first", "rank", *heads, "error")]
        for choice in self:
            costs = _costs(getattr(choice, measure) for measure in shown)
            rows.append((choice.path, *_name(choice), *costs, f"{choice.error:.4f}"))
        rows.append(("other layers", "", "", *_costs(self._rest(m) for m in shown), ""))
        rows.append(("total", "", "", *_costs(self.total(m) for m in shown), ""))
        return f"{table(rows, left=2)}\n{self._summary()}"

    def _summary(self) -> str:
        if self.budget is None:
            return f"{self.selector}, without a budget"
        _, reached, share = _costs([self.total(self.budget.measure)])
        return f"{self.selector}, {self.budget}: {reached}, {share}"

    def compare(self, other: "Plan") -> str:
        """A table of two plans side by side: the ranks, parameters, macs and errors of A and B."""
        facts = ("rank", "parameters", "macs", "error")
        rows = [("layer", *(f"{fact} {plan}" for fact in facts for plan in "AB"), "")]
        mine, theirs = ({choice.path: choice for choice in plan} for plan in (self, other))
        for path in dict.fromkeys([*mine, *theirs]):
            pairs = zip(_facts(mine.get(path)), _facts(theirs.get(path)), strict=True)
            rows.append((path, *(text for pair in pairs for text in pair), ""))
        totals = [number(plan.total(m)[1]) for m in facts[1:3] for plan in (self, other)]
        rows.append(("total", "", "", *totals, "", "", ""))
        return f"{table(rows, left=1)}\nA: {self._summary()}\nB: {other._summary()}"

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan as JSON; the file appears whole or not at all."""
        data = {"version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps(data, indent=1, allow_nan=False)
        with whole_file(path) as scratch:
            scratch.write_text(text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is nothing at the path.
            ValueError: the file is damaged, holds something else, or is of another version.
        """
        check_exists(path, "give what Plan.save wrote")
        try:
            data = json.loads(Path(path).read_text(), parse_constant=_refuse)
            if (version := data.pop("version")) != VERSION:
                raise ValueError(f"its version is {version!r}, not {VERSION}")
            return _plan(**data)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            reason = _short(f"{type(error).__name__}: {error}")
            raise ValueError(
                f"{path} is no whole plan ({reason}). Give another file, or save the plan anew."
            ) from None


def _plan(
    choices: list, selector: str, budget: dict | None, rest: dict, leaves: Sequence[dict] = ()
) -> Plan:
    if not isinstance(selector, str):
        raise TypeError(f"the selector {selector!r} is no name")
    return Plan(
        choices=tuple(_choice(**choice) for choice in choices),
        selector=selector,
        budget=Budget(**budget) if budget else None,
        rest=Rest(**{measure: _cost(cost) for measure, cost in rest.items()}),
        leaves=tuple(_leaf(**leaf) for leaf in leaves),
    )


def _leaf(path: list, shape: list, dtype: str) -> Leaf:
    return Leaf(path=tuple(path), shape=tuple(shape), dtype=dtype)


def _choice(
    path: str,
    scheme: dict | None,
    error: float,
    latency: list | None,
    changed: bool = False,
    **costs: list,
) -> Choice:
    if not isinstance(path, str) or not 0 <= error <= 1 or not isinstance(changed, bool):
        raise ValueError(f"the layer {path!r} has the error {error!r}, changed: {changed!r}")
    pairs: dict[str, Any] = {measure: _pair(pair) for measure, pair in costs.items()}
    return Choice(
        path=path,
        scheme=_scheme(**scheme) if scheme else None,
        latency=_pair(latency) if latency else None,
        error=error,
        changed=changed,
        **pairs,
    )


def _scheme(rank: int, groups: int, axes: str, first: str, inner: int | None = None) -> Scheme:
    ranks = (rank,) if inner is None else (rank, inner)
    if any(type(value) is not int or value < 1 for value in (*ranks, groups)):
        raise ValueError(f"a scheme has the ranks {ranks!r} and the groups {groups!r}")
    split_axes(axes, first)  # refuses what is no layout and no form
    if inner is None:
        return SCHEMES[first](rank, groups, axes, first)
    if first != Tucker.first:
        raise ValueError(f"a scheme with the rank {inner!r} within has the form {first!r}")
    return Tucker(rank, groups, axes, inner=inner)


def _pair(costs: list) -> Pair:
    dense, chosen = costs
    return _cost(dense), _cost(chosen)


def _cost(value: Any) -> Any:
    if not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{value!r} is no cost")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is no number")


def _short(text: str, most: int = 80) -> str:
    """A text without its end, if it is long: an error may quote what a file holds."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _name(choice: Choice) -> tuple[str, str]:
    if choice.scheme is None:
        return "", "dense"
    return choice.scheme.name, "x".join(map(str, choice.scheme.ranks))


def _costs(pairs: Iterable[Pair]) -> list[str]:
    """Dense cost, chosen cost and their ratio, for each pair."""
    texts: list[str] = []
    for dense, chosen in pairs:
        share = chosen / dense if dense else 1.0
        texts += [number(dense), number(chosen), f"{100 * share:.3g} %"]
    return texts


def _facts(choice: Choice | None) -> tuple[str, ...]:
    if choice is None:
        return ("-",) * 4
    rank = " ".join(_name(choice)).strip()
    return rank, number(choice.parameters[1]), number(choice.macs[1]), f"{choice.error:.4f}"
