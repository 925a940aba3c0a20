"""Rules by path: a table of patterns that says what becomes of every layer."""

import dataclasses
import math
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol

from lowrank_jax.factorization.axes import fit_axes, kernel_size, spatial_axes
from lowrank_jax.factorization.matrix import Matrix
from lowrank_jax.factorization.ranks import max_rank
from lowrank_jax.factorization.scheme import Scheme
from lowrank_jax.factorization.separable import Separable
from lowrank_jax.program.kernel_use import KernelUse, Trace
from lowrank_jax.tree.suggest import suggest

Rule = int | float | Scheme | None
Measure = Literal["parameters", "macs"]


class Planned(Protocol):
    """What holds a table of ranks, as a `Plan` does."""

    @property
    def ranks(self) -> Mapping[str, Scheme]:
        """Layer path to its scheme."""


Rules = Mapping[str, Rule] | Planned


def as_table(rules: Rules) -> Mapping[str, Rule]:
    """The table of a plan, or the table itself.

    Args:
        rules: pattern to rule, or a `Plan`.

    Raises:
        ValueError: a table has no entry, a key is no string, or it is neither a table nor a plan.

    Example:
        >>> as_table({"stage3/.*": 0.5, "stem": None})
        {'stage3/.*': 0.5, 'stem': None}
    """
    table = getattr(rules, "ranks", rules)
    if not isinstance(table, Mapping):
        raise ValueError(
            f"A {type(rules).__name__} is no table of ranks; give {{path: rank}} or a plan."
        )
    if table is rules and not table:
        raise ValueError(
            "The table of ranks is empty; name at least one layer, as in {'Conv_0': 10}."
        )
    if wrong := [key for key in table if not isinstance(key, str)]:
        raise ValueError(f"The key {wrong[0]!r} is no path; give a str, as in {{'Conv_0': 10}}.")
    return table


def resolve(
    rules: Rules,
    layers: Trace | Mapping[str, Sequence[int]],
    *,
    axes: str = "HWIO",
    measure: Measure = "parameters",
    units: Mapping[str, Scheme] | None = None,
) -> dict[str, Scheme]:
    """The scheme of every layer that a table of rules decomposes.

    A key is a layer's path, or a regular expression that the whole path must match
    (`re.fullmatch`). A key that is the path of a layer means that layer alone, whatever regular
    expression it may be. The first rule that matches a layer decides it. A layer that no rule
    matches stays dense.

    The value of a rule is one of these:

    - an int: the rank, which must fit every layer that the rule decides.
    - a float above 0 and up to 1: a share of the layer's cost, its parameters if no other measure
      is named. The layer gets the largest rank of its usual scheme whose factors cost no more.
      A layer where no rank does stays dense.
    - a `Separable`, `Channel`, `Tucker` or `Matrix`: the scheme.
    - None: the layer stays dense.

    A layer that cannot be decomposed stays as it is.

    Args:
        rules: pattern to rule, or a `Plan`.
        layers: the trace of the program, which tells layouts, groups and costs. Without a trace,
            layer path to kernel shape; the layers then have one group, or those of the `Separable`.
        axes: layout of the kernels where there is no trace, such as "OIHW".
        measure: of a share, "parameters" or "macs"; macs need a trace.
        units: layer path to the scheme of rank 1, where groups and layout are known without a
            trace.

    Returns:
        Path to scheme, in the order of the layers.

    Raises:
        ValueError: the table is empty, a key is no regular expression, a value is not allowed or
            does not fit its layer, or a rule is idle: it matches no layer, earlier rules decide
            all that it matches, or none of these can be decomposed as it asks.

    Example:
        >>> shapes = {"stem": (3, 3, 3, 8), "stage/0": (3, 3, 8, 8), "stage/1": (3, 3, 8, 8)}
        >>> found = resolve({"stem": None, "stage/1": 2, "stage/.*": 0.5}, shapes)
        >>> {path: scheme.rank for path, scheme in found.items()}
        {'stage/0': 6, 'stage/1': 2}
    """
    table = as_table(rules)
    if isinstance(layers, Trace):
        known = _traced(layers, measure)
    else:
        known = _stored(layers, axes, measure, units or {})
    if table is not rules:
        _check_network(table, known)
        _check_sizes(rules, known)
    schemes: dict[str, Scheme | None] = {}
    for key, value in table.items():
        schemes |= _apply(key, value, [known[path] for path in _decided(key, known, schemes)])
    return {path: scheme for path in known if (scheme := schemes.get(path))}


def _check_network(plan: Mapping[str, Rule], known: Collection[str]) -> None:
    """Refuses a plan most of whose layers the network has not."""
    missing = [path for path in plan if path not in known]
    if 2 * len(missing) > len(plan):
        raise ValueError(
            f"The plan is of another network: {len(missing)} of its {len(plan)} layers, such as "
            f"{missing[0]!r}, are not in this one, which has {', '.join(list(known)[:4])}. Give "
            "the network of the plan, or make a plan for this one."
        )


def _check_sizes(plan: Rules, known: Mapping[str, "_Layer"]) -> None:
    """Refuses a plan whose layers have other kernels than those of the network."""
    for choice in getattr(plan, "choices", ()):
        layer = known.get(choice.path)
        if layer is None or choice.changed or choice.scheme is None:
            continue
        wanted, found = choice.parameters[0], math.prod(layer.shape)
        if wanted != found:
            raise ValueError(
                f"The plan is of another network: {choice.path} has {wanted:,} weights in the plan "
                f"and {found:,} here, {layer.shape}. Give the network of the plan, or make a plan "
                "for this one."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer; its cost dense and at rank 1 are known where it can be decomposed.

    The groups are 0 where they are not known.
    """

    path: str
    shape: tuple[int, ...]
    axes: str = ""
    groups: int = 0
    dense: int = 0
    unit: int = 0
    reason: str = ""


def _traced(trace: Trace, measure: Measure) -> dict[str, _Layer]:
    if measure not in ("parameters", "macs"):
        raise ValueError(f"measure={measure!r} is not allowed; give 'parameters' or 'macs'.")
    return {path: _of_calls(path, trace.at(path), measure) for path in trace.paths()}


def _of_calls(path: str, calls: Sequence[KernelUse], measure: Measure) -> _Layer:
    kernel = calls[0]
    if reasons := [call.reason for call in calls if not call.safe]:
        return _Layer(path=path, shape=kernel.kernel_shape, reason=reasons[0])
    unit = kernel.scheme(1)
    if measure == "parameters":
        costs = kernel.parameters, kernel.parameters_at(unit)
    else:
        costs = sum(call.macs for call in calls), sum(call.macs_at(unit) for call in calls)
    return _Layer(
        path=path,
        shape=kernel.kernel_shape,
        axes=kernel.axes,
        groups=kernel.groups,
        dense=costs[0],
        unit=costs[1],
    )


def _stored(
    shapes: Mapping[str, Sequence[int]], axes: str, measure: Measure, units: Mapping[str, Scheme]
) -> dict[str, _Layer]:
    if measure != "parameters":
        raise ValueError(f"measure={measure!r} needs a trace; give one, or 'parameters'.")
    return {
        path: _of_shape(path, tuple(shape), axes, units.get(path)) for path, shape in shapes.items()
    }


def _of_shape(path: str, shape: tuple[int, ...], axes: str, unit: Scheme | None) -> _Layer:
    if len(shape) < 2 or 0 in shape:
        return _Layer(path=path, shape=shape, reason=f"{shape} is no kernel of a layer")
    groups = unit.groups if unit else 0
    unit = unit or _unit(fit_axes(axes, len(shape)))
    dense = kernel_size(unit.axes, shape)
    costs = {"dense": dense, "unit": unit.parameters(shape)}
    return _Layer(path=path, shape=shape, axes=unit.axes, groups=groups, **costs)  # type: ignore[arg-type]


def _decided(key: str, known: Mapping[str, _Layer], before: Collection[str]) -> list[str]:
    """The layers that a rule is the first to match."""
    matched = _matched(key, known)
    if not matched:
        advice = suggest(key, list(known), "there are no layers.")
        raise ValueError(f"The rule {key!r} matches no layer; {advice}")
    if fresh := [path for path in matched if path not in before]:
        return fresh
    raise ValueError(
        f"The rule {key!r} is idle: rules before it decide {matched[0]!r} and all else that it "
        "matches. Put it before them, or leave it out."
    )


def _matched(key: str, paths: Collection[str]) -> list[str]:
    if key in paths:
        return [key]
    try:
        pattern = re.compile(key)
    except re.error as error:
        advice = suggest(key, list(paths), "there are no layers.")
        raise ValueError(
            f"The rule {key!r} is neither a layer nor a regular expression ({error}); {advice}"
        ) from error
    return [path for path in paths if pattern.fullmatch(path)]


def _apply(key: str, value: Rule, layers: Sequence[_Layer]) -> dict[str, Scheme | None]:
    """The schemes that a rule gives to the layers that it decides."""
    found = {layer.path: _scheme(layer, value) for layer in layers}
    if value is None or any(found.values()):
        return found
    layer = next((layer for layer in layers if not layer.reason), layers[0])
    if layer.reason:
        why, advice = f"cannot be decomposed: {layer.reason}", "Leave the rule out"
    else:
        why = f"rank 1 costs {layer.unit / layer.dense:.3g} of the layer"
        advice = "Raise the share, or give None"
    raise ValueError(f"{layer.path}: {why}. {advice}: {key!r}: {value!r}.")


def _scheme(layer: _Layer, value: Rule) -> Scheme | None:
    """The scheme of a layer by a rule; None if the layer stays dense."""
    if value is None or layer.reason:
        return None
    if isinstance(value, Scheme):
        return _fitting(layer, value)
    unit = _unit(layer.axes, layer.groups or 1)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        limit = max_rank(layer.shape, unit.groups, layer.axes, unit.first)
        rank = _largest(layer, float(value), limit)
        return dataclasses.replace(unit, rank=rank) if rank else None
    return _fitting(layer, dataclasses.replace(unit, rank=value))  # type: ignore[arg-type]


def _unit(axes: str, groups: int = 1) -> Scheme:
    """The usual scheme of a layout."""
    return Separable(1, groups, axes) if spatial_axes(axes) else Matrix(1, groups, axes)


def _largest(layer: _Layer, share: float, limit: int) -> int:
    """The largest rank whose factors cost no more than a share of the layer; 0 if none does."""
    if not 0 < share <= 1:
        raise ValueError(
            f"{layer.path}: the share {share!r} is not allowed; give a float above 0 and up to 1, "
            f"or an int from 1 to {limit} for a rank."
        )
    room = math.floor(share * layer.dense * (1 + 1e-12))  # 0.29 of 100 is 29
    return min(limit, room // layer.unit)


def _fitting(layer: _Layer, scheme: Scheme) -> Scheme:
    """The scheme with its rank as an int, or an error that says why the layer cannot have it."""
    groups = 0 if isinstance(scheme, Matrix) else layer.groups  # a matrix may have any
    if layer.groups and (scheme.axes != layer.axes or (groups and scheme.groups != groups)):
        fitting = dataclasses.replace(_unit(layer.axes, layer.groups), rank=scheme.rank)
        raise ValueError(f"{layer.path}: {scheme} does not fit the program; give {fitting}.")
    return scheme.checked(layer.shape, layer.path)
