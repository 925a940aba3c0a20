"""Options narrowed to what was measured: times on a device, or what the network loses by each
cut."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from lowrank_jax.factorization.separable import Separable
from lowrank_jax.planning.candidates import Option, Options
from lowrank_jax.planning.spectra import known_use


def timed(options: Options, times: Mapping[str, Mapping[Separable | None, float]]) -> Options:
    """The options that were measured faster than dense, with their time: a plan of any selector is
    never slower.

    Args:
        options: of every layer.
        times: path, then scheme, to the time of the layer; that of None is the dense one's. A
            layer that is not in it stays dense.

    Raises:
        ValueError: a path is unknown, a time is no finite number above 0, or that of the dense
            layer is missing.
    """
    _check(options, times, "times", lambda key: key is None or isinstance(key, Separable))
    for path, row in times.items():
        if None not in row or min(row.values()) <= 0:
            raise ValueError(
                f"times: {path}: give times above 0, with that of the dense layer under None."
            )

    def latency(path: str, option: Option) -> float:
        return times[path].get(option.scheme, math.inf) if path in times else 0.0

    def faster(path: str, layer: tuple[Option, ...]) -> tuple[Option, ...]:
        found = [dataclasses.replace(option, latency=latency(path, option)) for option in layer]
        return (found[0], *(option for option in found[1:] if option.latency < found[0].latency))

    return dataclasses.replace(
        options, layers={path: faster(path, layer) for path, layer in options.layers.items()}
    )


def listed(options: Options, divergences: Mapping[str, Mapping[tuple[str, int], float]]) -> Options:
    """Dense, and the options that a table of divergences lists by (first, rank).

    Raises:
        ValueError: a path is unknown, a divergence is no finite number, or nothing in the table is
            an option.
    """
    _check(
        options, divergences, "divergences", lambda key: isinstance(key, tuple) and len(key) == 2
    )
    layers = {
        path: (
            layer[0],
            *(option for option in layer[1:] if _listed(option, divergences.get(path, {}))),
        )
        for path, layer in options.layers.items()
    }
    if all(len(layer) == 1 for layer in layers.values()):
        raise ValueError(
            "divergences: nothing in the table is an option; measure ranks that are in options.layers."
        )
    return dataclasses.replace(options, layers=layers)


def order_and_rank(scheme: Separable) -> tuple[str, int]:
    """The key of a scheme in a table of divergences.

    Example:
        >>> order_and_rank(Separable(4, first="horizontal"))
        ('horizontal', 4)
    """
    return scheme.first, scheme.rank


def _listed(option: Option, row: Mapping[tuple[str, int], float]) -> bool:
    return option.scheme is not None and order_and_rank(option.scheme) in row


def _check(
    options: Options, table: Mapping[str, Mapping[Any, float]], name: str, is_key: Callable
) -> None:
    for path, row in table.items():
        known_use(options.trace, path)
        if path not in options.layers:
            raise ValueError(
                f"{name}: {path} has no spectrum; add one, or leave it out of the table."
            )
        for key, value in row.items():
            if not is_key(key) or not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise ValueError(
                    f"{name}: {path}: {key!r} has {value!r}; give a finite number for each scheme."
                )
